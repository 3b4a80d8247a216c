"""The texts that keys keep, as rotation of data keys and `doctor` see them (`providers.rotation.SealedTable`)."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

from django.db.models import Count

from providers import keyring
from providers.errors import CredentialUnavailable
from providers.rotation import SealedValue
from proxy import texts
from proxy.models import TextRecord

NAME = "proxy.TextRecord"
CHUNK = 200


class Texts:
    name = NAME

    def counts(self) -> dict[str, int]:
        rows = TextRecord.objects.order_by().values_list("data_key").annotate(Count("pk"))
        return dict(rows)

    def rewrap(self, *, after: str, most: int) -> tuple[str, list[str], list[SealedValue]]:
        primary = keyring.current().primary
        rows = TextRecord.objects.exclude(data_key=primary).order_by("pk")
        rows = rows.filter(pk__gt=uuid.UUID(after)) if after else rows
        done, wrong = [], []
        last = ""
        for row in rows[:most]:
            last = row.pk.hex
            try:
                fresh = texts.sealed(row.pk.hex, texts.read(row))
            except CredentialUnavailable as error:
                wrong.append(_value(row, error))
                continue
            now = {**fresh, "data_key": primary}
            if TextRecord.objects.filter(pk=row.pk, prompt=row.prompt, answer=row.answer).update(**now):
                done.append(last)
        return last, done, wrong

    def broken(self) -> Iterator[SealedValue]:
        for row in TextRecord.objects.order_by("pk").iterator(chunk_size=CHUNK):
            try:
                texts.read(row)
            except CredentialUnavailable as error:
                yield _value(row, error)


def _value(row: TextRecord, error: CredentialUnavailable) -> SealedValue:
    return SealedValue(NAME, row.pk.hex, "text", str(row), error.detail or error.text)
