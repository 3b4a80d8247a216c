"""Take over prices from the installed price list."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from proxy import prices
from proxy.price_source import PACKAGE


class Command(BaseCommand):
    help = (
        "Adds prices that the installed price list has and the table has not; changes no row and asks nobody."
    )

    def handle(self, *args: Any, **options: Any) -> None:
        done = prices.refresh(via="command")
        if done.problem:
            raise CommandError(f"The price list of {PACKAGE} cannot be used: {done.problem}")
        self.stdout.write(f"{done.added} new prices from {PACKAGE} {done.package_version}")
