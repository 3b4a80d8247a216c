"""``manage.py import_config``: make the configuration what a file says."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from providers.keyring import WrongEncryptionKey
from proxy.configuration import differing, foreign, reading
from proxy.configuration.restoring import Refused, restore

DIFFERENT = 2


class Command(BaseCommand):
    help = (
        "Import a configuration: a document of export_config or a backup (YAML or JSON), providers.yaml, api_keys.csv, or "
        "another system's config_backup.json. All of it or nothing; running it again changes nothing."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("file", help="the file; - is standard input")
        parser.add_argument(
            "--prune",
            action="store_true",
            help="also delete what the file's sections do not name; with managed_by in the file, only what it owns",
        )
        parser.add_argument(
            "--dry-run", action="store_true", help="show what would change, and change nothing"
        )
        parser.add_argument(
            "--diff",
            action="store_true",
            help="the same, and exit with 2 when there is a difference: for pipelines that look for drift",
        )

    def handle(self, *args: Any, file: str, prune: bool, dry_run: bool, diff: bool, **options: Any) -> None:
        try:
            source = foreign.source_of(reading.read(_content(file), counted=False))
            outcome = restore(source, actor=None, prune=prune, dry_run=dry_run or diff)
        except (reading.Unreadable, WrongEncryptionKey) as error:
            raise CommandError(str(error)) from None
        except Refused as error:
            for problem in error.problems:
                self.stderr.write(str(problem))
            raise CommandError(f"{len(error.problems)} problems; nothing was imported") from None
        for line in differing.as_lines(outcome.changes):
            self.stdout.write(line)
        for note in outcome.notes:
            self.stderr.write(f"note: {note}")
        self.stdout.write(differing.in_a_word(outcome, planned=dry_run or diff))
        if diff and outcome.changes:
            sys.exit(DIFFERENT)


def _content(file: str) -> bytes:
    try:
        if file == "-":
            return sys.stdin.buffer.read(reading.MAX_BYTES + 1)
        with Path(file).open("rb") as opened:
            return opened.read(reading.MAX_BYTES + 1)
    except OSError as error:
        raise CommandError(f"{file} cannot be read: {error.strerror}") from None
