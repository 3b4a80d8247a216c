"""Django's `loaddata`, as one recorded change."""

from typing import Any

from django.core.management.commands.loaddata import Command as DjangoCommand

from audit.changes import changes


class Command(DjangoCommand):
    def handle(self, *fixtures: Any, **options: Any) -> None:
        with changes(actor=None, via="command"):
            super().handle(*fixtures, **options)
