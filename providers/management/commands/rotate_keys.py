"""``manage.py rotate_keys``: change the keys that secrets are sealed under, while everything runs."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand, CommandError

from providers import rotation
from providers.keyring import WrongEncryptionKey


class Command(BaseCommand):
    help = (
        "new: seal under a new data key from now on (and wrap the keyring under PENSTOCK_NEW_ENCRYPTION_KEY too, if set). "
        "rewrap: seal what is stored again; may be killed and run again. retire: forget the keys that nothing needs."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("step", nargs="?", choices=("new", "rewrap", "retire"))
        parser.add_argument(
            "--status", action="store_true", help="say which keys there are and what they seal"
        )
        parser.add_argument(
            "--batch", type=int, default=rotation.BATCH, help="values sealed again in one transaction"
        )

    def handle(self, *args: Any, step: str | None, status: bool, batch: int, **options: Any) -> None:
        if not step and not status:
            raise CommandError("say new, rewrap or retire, or --status")
        try:
            if step:
                self._take(step, max(1, batch))
            if status:
                self._tell()
        except (rotation.RotationRefused, WrongEncryptionKey) as error:
            raise CommandError(str(error)) from None

    def _take(self, step: str, batch: int) -> None:
        if step == "new":
            self.stdout.write(f"new values are sealed under {rotation.new_key()}")
        elif step == "retire":
            self.stdout.write(f"retired: {', '.join(rotation.retire()) or 'no data key'}")
        else:
            self._rewrap(batch)

    def _rewrap(self, batch: int) -> None:
        result = rotation.rewrap(
            batch=batch, tell=lambda count: self.stdout.write(f"{count} values sealed again")
        )
        for value in result.failed:
            self.stderr.write(f"{value} ({value.key}): {value.problem}")
        if result.failed:
            raise CommandError(f"{len(result.failed)} values do not open; enter them again or delete them")
        self.stdout.write(f"done: {result.count} values were sealed again")

    def _tell(self) -> None:
        found = rotation.status()
        for kid, count in found.values.items():
            word = "primary" if kid == found.primary else "older" if kid else "not sealed"
            self.stdout.write(f"data key {kid or '-'} ({word}): {count} values")
        self.stdout.write(
            f"wrapped under {found.wraps} encryption keys, {found.foreign} of them not configured here"
        )
