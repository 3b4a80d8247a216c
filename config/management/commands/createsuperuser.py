"""Django's `createsuperuser`, with the change recorded."""

from typing import Any

from django.contrib.auth.management.commands.createsuperuser import Command as DjangoCommand

from audit.changes import each_save


class Command(DjangoCommand):
    def handle(self, *args: Any, **options: Any) -> str | None:
        with each_save(via="command"):
            return super().handle(*args, **options)
