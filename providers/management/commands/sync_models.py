"""``manage.py sync_models``: ask providers for their models, and keep the answers."""

from __future__ import annotations

import sys
from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from providers import catalog
from providers.errors import ProviderError


class Command(BaseCommand):
    help = "Learn the models of providers by slug, of all enabled ones when none is named. Exits with 1 when one cannot be asked."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("slugs", nargs="*", metavar="slug")

    def handle(self, *args: Any, slugs: list[str], **options: Any) -> None:
        try:
            providers = catalog.by_slug(slugs)
        except catalog.UnknownSlug as error:
            raise CommandError(str(error)) from None
        failed = False
        for provider in providers:
            try:
                found = catalog.refresh_models(provider, actor=None, via="command")
            except ProviderError as error:
                failed = True
                self.stderr.write(f"{provider.slug}: {error.detail or error.text}")
                continue
            self.stdout.write(
                f"{provider.slug}: {len(found.models)} models, {len(found.added)} new, {len(found.updated)} changed, "
                f"{len(found.removed)} gone"
            )
        if failed:
            sys.exit(1)
