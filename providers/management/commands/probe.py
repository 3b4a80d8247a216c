"""``manage.py probe``: ask providers how they are, now."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from providers import catalog, health


class Command(BaseCommand):
    help = "Probe providers by slug, all enabled ones when none is named. Exits with 1 when one of them is not online."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("slugs", nargs="*", metavar="slug")

    def handle(self, *args: Any, slugs: list[str], **options: Any) -> None:
        try:
            providers = catalog.by_slug(slugs)
        except catalog.UnknownSlug as error:
            raise CommandError(str(error)) from None
        failing = False
        for provider in providers:
            reading = health.probe_now(provider)
            failing |= reading.status != "online"
            code = f" {reading.status_code}" if reading.status_code else ""
            self.stdout.write(f"{provider.slug}: {reading.status}{code} {reading.detail}".rstrip())
        if failing:
            sys.exit(1)
