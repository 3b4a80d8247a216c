"""A gateway key from the command line."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from audit.changes import changes
from proxy import keys, owners
from proxy.models import GatewayKey


class Command(BaseCommand):
    help = "Issues a gateway key and prints it, this once."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("name", help="who or what will use it")
        parser.add_argument("--owner", help="whose usage this is: a user, or a team like team:ml")
        parser.add_argument(
            "--max-concurrency", type=int, metavar="N", help="requests at the same time; no limit if left out"
        )

    def handle(self, *args: Any, name: str, owner: str | None, **options: Any) -> None:
        key = GatewayKey(
            name=name,
            holder=_owner(owner) if owner else None,
            max_concurrency=options["max_concurrency"],
        )
        whole = keys.give_secret(key)
        try:
            with changes(actor=None, via="command"):
                key.full_clean()
                key.save()
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from None
        self.stdout.write(whole)


def _owner(text: str) -> owners.Owner:
    found = owners.find(text)
    if found is None:
        raise CommandError(f"there is no user or team {text}")
    return found
