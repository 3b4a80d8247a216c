"""``manage.py export_config``: the configuration as a file, to be kept, reviewed and imported again."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from proxy.configuration import document, exporting


class Command(BaseCommand):
    help = "Print the configuration as YAML or JSON, without secrets unless --with-sealed says otherwise; never one in clear."

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--format", choices=("yaml", "json"), default="yaml")
        parser.add_argument(
            "--with-sealed",
            action="store_true",
            help="a whole backup: sealed secrets and the wrapped keyring, gateway keys' HMACs, discovered models",
        )

    def handle(self, *args: Any, with_sealed: bool, **options: Any) -> None:
        made = exporting.taken_out(actor=None, via="command") if with_sealed else document.build(sealed=False)
        write = document.as_yaml if options["format"] == "yaml" else document.as_json
        self.stdout.write(write(made), ending="")
