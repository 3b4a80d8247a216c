"""Move usage records from the spool into the database."""

from __future__ import annotations

import signal
import threading
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError, CommandParser

from audit.postgres import SERVER
from providers.hardening import harden_process
from proxy import usage

STOP_SECONDS = 3.0
"""Once told to stop, no answer of the database is waited for any longer: what was not committed stays in the spool."""


class Command(BaseCommand):
    help = "Move usage records from the spool into the database; with --follow, until stopped."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--follow", action="store_true", help="keep draining every second until SIGTERM")

    def handle(self, *args: Any, **options: Any) -> None:
        harden_process()
        if options["follow"]:
            usage.follow(settings.SPOOL_DIR, _stopping())
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


def _stopping() -> threading.Event:
    """An event that SIGTERM and SIGINT set."""
    stop = threading.Event()

    def end(*_: object) -> None:
        SERVER.at_most = STOP_SECONDS
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    return stop
