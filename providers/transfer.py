"""Sealed values on their way between installations: as a backup holds them, and taken over from one.

A value travels sealed, with the id of its data key in it; the wrapped keyring travels along. Whoever has neither the same
encryption key nor the same database opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings

from providers import crypto, keyring, keys
from providers.crypto import Secret, Wrap
from providers.errors import CredentialUnavailable
from providers.fields import raw
from providers.models import ApiKey
from providers.models import Keyring as KeyringRow

MAX_WRAPS = 4
MAX_ROUNDS = 2_000_000
"""A file may name any number of rounds, and each takes its time."""


class CannotOpen(Exception):
    """A sealed value that this installation cannot open. The message says why, and nothing of the value."""


def keyring_for_backup() -> dict[str, Any]:
    """The keyring as it is stored: the id of its primary key, and the wrapped whole under each accepted encryption key."""
    row = KeyringRow.objects.get()
    return {"primary": row.primary_kid, "wraps": row.wraps}


class Opener:
    """Opens sealed values of a document: with this installation's keyring, else with the one that came along.

    described: the `keyring` of the document, not to be trusted. Opening it takes a quarter of a second for each wrap and
    encryption key, so it is done here, before a transaction, and only for a document that has values under other data keys.
    """

    def __init__(self, described: Any, *, data_keys: set[str]) -> None:
        self._ours = keyring.current()
        self._theirs = _unwrapped(described) if data_keys - self._ours.keys.keys() else None

    def open(self, key: ApiKey, sealed: str) -> Secret:
        """What was sealed for this key and its provider's address. Raises CannotOpen."""
        ring = self._ours if crypto.key_id(sealed) in self._ours.keys else self._theirs
        if ring is None:
            raise CannotOpen(
                f"Is sealed under the data key {crypto.key_id(sealed)[:16] or '-'}, which is in no keyring that "
                "PENSTOCK_ENCRYPTION_KEY opens. Give the encryption key of the installation it comes from."
            )
        try:
            return ring.open(sealed, aad=keyring.aad_of(key))
        except CredentialUnavailable as error:
            raise CannotOpen(f"Does not open: {error.detail or error.text}.") from error

    def take_over(self, key: ApiKey, value: Secret, *, sealed: str = "") -> None:
        """Put `value` into `key`; as it was sealed where our own keyring opens that, else sealed anew. Does not save."""
        keys.store(key, value.reveal())
        if crypto.key_id(sealed) in self._ours.keys:
            key.secret = sealed

    def holds(self, key: ApiKey, value: Secret) -> bool:
        """Whether this is what `key` has already."""
        return bool(key.secret) and key.fingerprint == self._ours.fingerprint(value.reveal())


def opens_here(described: Any) -> bool:
    """Whether the keyring of a document opens with an encryption key of this installation; takes a while."""
    return _unwrapped(described) is not None


def set_aside(text: str, *, purpose: str) -> str:
    """A text sealed for `purpose` alone: what waits for somebody's word must not lie about in clear."""
    return keyring.current().seal(text, aad=purpose.encode())


def taken_up(sealed: str, *, purpose: str) -> str:
    """What was set aside. Raises CannotOpen."""
    try:
        return keyring.current().open(sealed, aad=purpose.encode()).reveal()
    except CredentialUnavailable as error:
        raise CannotOpen("It was set aside for somebody else, or under a key that is gone.") from error


def data_key(sealed: str) -> str:
    """The id of the data key that a value is sealed under; empty when it is no sealed value."""
    return crypto.key_id(sealed)


def as_secret(value: str) -> Secret:
    return Secret(value)


def sealed_of(key: ApiKey) -> str:
    """The value of a key as it is stored."""
    return raw(key.secret)


def reference_of(key: ApiKey) -> str:
    """The reference that is sealed for this key; empty when it is a secret, or when the text shown is not what was sealed."""
    if key.reference and keyring.current().fingerprint(key.reference) == key.fingerprint:
        return key.reference
    return ""


def _unwrapped(described: Any) -> crypto.Keyring | None:
    wraps = described.get("wraps") if isinstance(described, Mapping) else None
    configured = [settings.PENSTOCK_ENCRYPTION_KEY, settings.PENSTOCK_NEW_ENCRYPTION_KEY]
    for stored in wraps[:MAX_WRAPS] if isinstance(wraps, list) else ():
        if (wrap := _wrap(stored)) is None:
            continue
        for encryption_key in configured:
            if encryption_key and (ring := crypto.unwrap(wrap, encryption_key)) is not None:
                return ring
    return None


def _wrap(stored: Any) -> Wrap | None:
    """A wrap as a document describes it; None when it is none that we made."""
    if not isinstance(stored, Mapping) or stored.keys() != {"salt", "rounds", "blob"}:
        return None
    salt, rounds, blob = stored["salt"], stored["rounds"], stored["blob"]
    texts = isinstance(salt, str) and isinstance(blob, str) and salt.isascii() and blob.isascii()
    if not texts or type(rounds) is not int or not crypto.ROUNDS <= rounds <= MAX_ROUNDS:
        return None
    return Wrap(salt, rounds, blob)
