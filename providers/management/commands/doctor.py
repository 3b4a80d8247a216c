"""``manage.py doctor``: is everything that must open, open; is everything that must guard, there."""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from dataclasses import asdict
from typing import Any

from django.core.management.base import BaseCommand
from django.db import DatabaseError

from providers import diagnosis


class Command(BaseCommand):
    help = "Check the keyring, every sealed value, the audit log's triggers and its head. Exits with 1 when something is wrong."
    requires_system_checks: Any = []  # wrong settings are findings too

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")

    def handle(self, *args: Any, **options: Any) -> None:
        try:
            findings = diagnosis.diagnose()
        except DatabaseError as error:
            findings = [diagnosis.Finding("database", f"cannot be read: {type(error).__name__}")]
        if options["json"]:
            self.stdout.write(
                json.dumps({"ok": not findings, "findings": [asdict(each) for each in findings]})
            )
        else:
            for each in findings:
                self.stdout.write(str(each))
            self.stdout.write(f"{len(findings)} problems" if findings else "all is well")
        if findings:
            sys.exit(1)
