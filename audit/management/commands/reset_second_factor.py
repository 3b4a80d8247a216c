"""For the administrator who has lost his own phone, and has nobody else to ask."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.contrib.auth.models import User
from django.core.management.base import BaseCommand, CommandError

from audit.access import second_factor
from audit.changes import changes


class Command(BaseCommand):
    help = "Removes all second factors of a user, whose password alone opens again; it is in the audit log."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("username")

    def handle(self, *args: Any, **options: Any) -> None:
        user = User.objects.filter(username=options["username"]).first()
        if user is None:
            raise CommandError(f"there is no user {options['username']!r}")
        with changes(actor=None, via="command"):
            count = second_factor.reset(user)
        self.stdout.write(f"removed {count} of {user.get_username()}" if count else "there was none")
