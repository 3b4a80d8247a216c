"""What the page about one's own account tells."""

from __future__ import annotations

from typing import Any

from allauth.mfa import app_settings
from allauth.socialaccount.models import SocialAccount
from django import template

register = template.Library()


@register.simple_tag
def unused_codes(recovery_codes: Any) -> int:
    """How many recovery codes are left, without opening them."""
    return int(app_settings.RECOVERY_CODE_COUNT - recovery_codes.instance.data["used_mask"].bit_count())


@register.simple_tag
def linked_identity(user: Any) -> Any:
    return SocialAccount.objects.filter(user_id=user.pk).first()
