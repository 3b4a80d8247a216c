"""Move usage records from the spool into the database."""

from __future__ import annotations

import signal
import threading
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from proxy import usage


class Command(BaseCommand):
    help = "Move usage records from the spool into the database; with --follow, until stopped."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--follow", action="store_true", help="keep draining every second until SIGTERM")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["follow"]:
            stop = threading.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stop.set())
            usage.follow(settings.SPOOL_DIR, stop)
            return
        try:
            report = usage.drain(settings.SPOOL_DIR)
        except usage.UsageStoreUnavailable as error:
            raise CommandError(
                f"The database does not take usage records; they stay in the spool: {error}"
            ) from error
        if report.busy:
            self.stdout.write("Another drainer has this spool; nothing was done here.")
            return
        self.stdout.write(
            f"Drained {report.records} records ({report.interrupted} interrupted) from {report.segments} segments;"
            f" {report.corrupt} corrupt lines, {report.rejected} rejected, {report.waiting} segments in use."
        )
