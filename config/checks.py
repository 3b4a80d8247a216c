"""System checks: every wrong setting by name, with what to write instead."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, register


@register()
def settings_are_right(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    return [Error(str(problem), id="penstock.E001") for problem in settings.SETTINGS_PROBLEMS]
