"""Rebuild the sums per hour from the usage records."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.utils.dateparse import parse_datetime

from proxy import usage_hours


def moment(text: str) -> datetime:
    """A date or a time in ISO 8601; UTC where it names no offset. ValueError for anything else."""
    found = parse_datetime(text if "T" in text or " " in text else f"{text}T00:00:00")
    if found is None:
        raise ValueError(text)
    return found if found.tzinfo else found.replace(tzinfo=UTC)


class Command(BaseCommand):
    help = (
        "Rebuild the sums per hour from the usage records, an hour at a time; the drainer may run meanwhile."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument(
            "--since", type=moment, help="from this hour on (ISO 8601, UTC); the first if left out"
        )
        parser.add_argument(
            "--until", type=moment, help="up to this time (ISO 8601, UTC); the end if left out"
        )

    def handle(self, *args: Any, since: datetime | None, until: datetime | None, **options: Any) -> None:
        hours = records = 0
        last = None
        try:
            for last, found in usage_hours.rebuild(since=since, until=until):
                hours, records = hours + 1, records + found
                if options["verbosity"] > 1:
                    self.stdout.write(f"{last:%Y-%m-%dT%H}: {found} records")
        except DatabaseError as error:
            done = f" What was done is kept; go on with --since {last:%Y-%m-%dT%H:%M}." if last else ""
            raise CommandError(f"The database does not take it: {str(error).strip()}.{done}") from error
        self.stdout.write(f"Rebuilt the sums of {hours} hours from {records} records.")
