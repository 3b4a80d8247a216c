"""Changing the keys that secrets are sealed under, while everything runs.

    new       add a data key; from now on values are sealed under it. With PENSTOCK_NEW_ENCRYPTION_KEY set, also wrap the
              keyring under that key, so that processes start with either.
    rewrap    seal every stored value again under the newest data key, those of other apps (`TABLES`) too: batch by batch, a value only while it is still the one
              that was read. It may be killed at any row and run again.
    retire    forget the older data keys, and the encryption keys that are not configured, once nothing needs them.

To change PENSTOCK_ENCRYPTION_KEY: `new` with both set, restart everything with the new one alone, `rewrap`, `retire`.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

from django.utils import timezone

from audit.changes import changes, record
from audit.models import Entry
from providers import keyring
from providers.errors import CredentialUnavailable
from providers.models import ApiKey
from providers.models.keyring import Keyring as KeyringRow

BATCH = 50
SETTLE = timedelta(seconds=10)
"""Processes learn of rewrapped values within a second, five in all; until then they may hold ciphertexts under an old key."""

_REWRAP = "rewrap_keyring"
_NAMED = 20


class SealedTable(Protocol):
    """A table of sealed values that another app has, besides the keys of providers. Its rows are rewrapped inside `audit.changes`."""

    name: str

    def counts(self) -> dict[str, int]:
        """How many rows are sealed under each data key, by its id."""
        ...

    def rewrap(self, *, after: str, most: int) -> tuple[str, list[str], list[SealedValue]]:
        """Seal again up to `most` rows behind `after` that are not under the primary key: the last one looked at (empty: there were
        none), those that were done, and those that do not open. A row that was replaced since it was read is left alone."""
        ...

    def broken(self) -> Iterator[SealedValue]:
        """The rows that do not open."""
        ...


TABLES: list[SealedTable] = []
"""Filled by the apps that have some, when they are ready."""


class RotationRefused(Exception):
    """This step would lock somebody out, so nothing was done. The message says what to do first."""


@dataclass(frozen=True, slots=True)
class SealedValue:
    """Where a sealed value is, and what keeps it from opening (nothing: it opens)."""

    model: str
    pk: int | str
    field: str
    key: str
    problem: str = ""

    def __str__(self) -> str:
        return f"{self.model} {self.pk} {self.field}"


@dataclass(frozen=True, slots=True)
class Rewrapped:
    """What one `rewrap` did: values sealed anew, and those that do not open and were left as they are."""

    count: int
    failed: tuple[SealedValue, ...]


@dataclass(frozen=True, slots=True)
class KeyringStatus:
    """primary: the data key in use. values: how many values are under each data key. foreign: keys that are not configured."""

    primary: str
    values: dict[str, int]
    wraps: int
    foreign: int


def new_key() -> str:
    """Add a data key and return its id. Raises RotationRefused or WrongEncryptionKey."""
    keyring.current()
    if keyring.foreign_wraps():
        raise RotationRefused(
            "the keyring is also wrapped under an encryption key that is not configured here; run retire first"
        )
    with changes(actor=None, via="command"):
        ring = keyring.current().with_new_key()
        keyring.replace(ring)
    return ring.primary


def rewrap(*, batch: int = BATCH, tell: Callable[[int], None] = lambda count: None) -> Rewrapped:
    """Seal again, under the primary key, whatever is under another. `tell` hears the number done after each batch."""
    primary = keyring.current().primary
    failed: list[SealedValue] = []
    done = after = 0
    while rows := _batch(after, batch):
        after = rows[-1].pk
        older = [key for key in rows if keyring.sealed_under(key) != primary]
        if older:
            done += _rewrap_batch(older, failed)
            tell(done)
    for table in TABLES:
        for count in _rewrap_table(table, batch, failed):
            done += count
            tell(done)
    return Rewrapped(done, tuple(failed))


def _rewrap_table(table: SealedTable, batch: int, failed: list[SealedValue]) -> Iterator[int]:
    """As for the keys: how many rows each transaction sealed again."""
    after = ""
    while True:
        with changes(actor=None, via="command"):
            after, done, wrong = table.rewrap(after=after, most=batch)
            failed += wrong
            if done:
                _record_rewrap(table.name, done)
        if not after:
            return
        yield len(done)


def _rewrap_batch(rows: list[ApiKey], failed: list[SealedValue]) -> int:
    """One transaction and one entry. A value that was replaced since it was read is left to whoever did that."""
    with changes(actor=None, via="command"):
        done = []
        for key in rows:
            try:
                fresh = keyring.resealed(key)
            except CredentialUnavailable as error:
                failed.append(_value(key, error.detail or error.text))
                continue
            if ApiKey.objects.filter(pk=key.pk, secret=key.secret).update(secret=fresh):
                done.append(key.pk)
        if done:
            _record_rewrap("providers.ApiKey.secret", done)
    return len(done)


def _record_rewrap(what: str, done: list[int] | list[str]) -> None:
    row = KeyringRow.objects.get()
    record(row, verb="rewrap", before={}, after={what: done, "primary": row.primary_kid})


def retire(*, wait: Callable[[float], None] = time.sleep) -> list[str]:
    """Drop all data keys but the primary, and wraps under other encryption keys; the ids of the dropped keys.

    Waits, at most ten seconds, until every process has learnt of the last rewrap. Raises RotationRefused, naming the rows,
    while a stored value is under an older key.
    """
    _refuse_if_used()
    wait(_left_to_settle())
    with changes(actor=None, via="command"):
        _refuse_if_used()
        ring = keyring.current()
        dropped = [kid for kid in ring.keys if kid != ring.primary]
        for kid in dropped:
            ring = ring.without(kid)
        keyring.replace(ring)
    return dropped


def _refuse_if_used() -> None:
    primary = keyring.current().primary
    used = [str(_value(key)) for key in _keys() if keyring.sealed_under(key) != primary]
    number = len(used)
    for table in TABLES:
        older = sum(count for kid, count in table.counts().items() if kid != primary)
        used += [f"{older} of {table.name}"] if older else []
        number += older
    if used:
        named = ", ".join(used[:_NAMED]) + (f" and {len(used) - _NAMED} more" if len(used) > _NAMED else "")
        raise RotationRefused(
            f"{number} values are not sealed under the primary key: {named}; run rewrap, and enter or delete those it names"
        )


def _left_to_settle() -> float:
    last = Entry.objects.filter(action=_REWRAP).order_by("-seq").values_list("timestamp", flat=True).first()
    if last is None:
        return 0.0
    return min(max((last + SETTLE - timezone.now()).total_seconds(), 0.0), SETTLE.total_seconds())


def status() -> KeyringStatus:
    """Which keys there are and what is sealed under them. Raises WrongEncryptionKey."""
    ring = keyring.current()
    counts = Counter(dict.fromkeys(ring.keys, 0))
    counts.update(keyring.sealed_under(key) for key in _keys())
    for table in TABLES:
        counts.update(table.counts())
    return KeyringStatus(
        ring.primary, dict(counts), len(KeyringRow.objects.get().wraps), keyring.foreign_wraps()
    )


def values_that_do_not_open() -> list[SealedValue]:
    """Every stored value that does not open for its row, or its provider's address. The keyring must be loaded."""
    found = [_value(key, problem) for key in _keys() if (problem := keyring.problem(key))]
    return [*found, *(value for table in TABLES for value in table.broken())]


def _value(key: ApiKey, problem: str = "") -> SealedValue:
    return SealedValue("providers.ApiKey", key.pk, "secret", str(key), problem)


def _keys() -> Iterator[ApiKey]:
    after = 0
    while rows := _batch(after, 500):
        after = rows[-1].pk
        yield from rows


def _batch(after: int, size: int) -> list[ApiKey]:
    return list(ApiKey.objects.select_related("provider").filter(pk__gt=after).order_by("pk")[:size])
