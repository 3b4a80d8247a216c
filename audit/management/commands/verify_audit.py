"""``manage.py verify_audit``: is the log of changes whole?"""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from audit.verify import verify


class Command(BaseCommand):
    help = (
        "Check every link of the audit log, its head and its anchors. Exits with 1 when something is wrong."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--anchors", type=Path, help="a copy of the anchor file that was kept elsewhere")

    def handle(self, *args: Any, anchors: Path | None, **options: Any) -> None:
        report = verify(anchors)
        for problem in report.problems:
            self.stdout.write(problem)
        if not report.ok:
            sys.exit(1)
        self.stdout.write(f"{report.entries} entries are whole; the head is {report.seq} {report.hash}")
