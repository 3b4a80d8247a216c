"""The configuration as one document, and the document as text. The same configuration always makes the same document."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from django.conf import settings
from django.utils import timezone

from audit.models import Head
from audit.strict_json import readable
from providers import transfer
from proxy.configuration.sections import SECTIONS, Section
from proxy.keys import digest
from proxy.snapshot import one_consistent_read

FORMAT = "penstock/1"
Document = dict[str, Any]

_PEPPER_CHECK = "penstock pepper"
"""What is hashed to tell peppers apart. No secret of a gateway key is like it, for it has a space."""

LEFT_OUT = (
    "# Made by `manage.py export_config`. Sealed secrets and gateway keys' HMACs are left out: importing this keeps those that\n"
    "# are stored, and makes no key that is not there. `--with-sealed` writes a whole backup. Models that providers list by\n"
    "# themselves, and vendors that nobody has touched, are left out too.\n"
)


def build(*, sealed: bool) -> Document:
    """The configuration, read at one moment.

    sealed: a whole backup, with sealed secrets, the wrapped keyring and everything that came by itself; else what people
    write down, without any secret.
    """
    with one_consistent_read():
        document: Document = {"format": FORMAT}
        if sealed:
            head = Head.objects.get(pk=1)
            document["made"] = {
                "at": timezone.now().isoformat(timespec="seconds"),
                "version": settings.VERSION,
                "head": {"seq": head.seq, "hash": head.hash},
            }
            document["keyring"] = transfer.keyring_for_backup()
            document["peppers"] = pepper_checks()
        for section in SECTIONS:
            if sealed or not section.backup_only:
                document[section.name] = _entries(section, sealed=sealed)
    return document


def _entries(section: Section, *, sealed: bool) -> list[Document]:
    rows = (row for row in section.only(section.all_rows()) if sealed or not section.by_itself(row))
    entries = [section.entry(row, sealed=sealed) for row in rows]
    names = section.found_by[-1]
    return sorted(entries, key=lambda entry: [str(entry[name]) for name in names])


def content_of(document: Mapping[str, Any]) -> Document:
    """The document without what says when it was made: equal for two backups of the same configuration."""
    return {name: value for name, value in document.items() if name != "made"}


def pepper_checks() -> dict[str, str]:
    """For each pepper of this installation, by number, what tells it from others."""
    return {
        str(number): digest(_PEPPER_CHECK, pepper)
        for number, pepper in sorted(settings.PENSTOCK_PEPPERS.items())
    }


def as_json(document: Document) -> str:
    return readable(document, indent=2) + "\n"


def as_yaml(document: Document) -> str:
    text: str = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
    return text if "keyring" in document else LEFT_OUT + text
