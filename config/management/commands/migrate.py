"""Django's `migrate`, by one process at a time, and never by an older version than the one that made the tables."""

from typing import Any

from django.core.management.base import CommandError
from django.core.management.commands.migrate import Command as DjangoCommand

from config.schema_version import alone, newer_problem


class Command(DjangoCommand):
    def execute(self, *args: Any, **options: Any) -> Any:
        # Django's checks, which come before `handle`, open the database: five at once would switch a new SQLite file to WAL at
        # the same moment, and nobody waits for that.
        with alone():
            return super().execute(*args, **options)

    def handle(self, *args: Any, **options: Any) -> None:
        if problem := newer_problem():
            raise CommandError(problem)
        super().handle(*args, **options)
