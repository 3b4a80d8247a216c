"""The keyring's row: made once, opened at start, rotated online."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.db import DatabaseError, transaction

from providers import crypto
from providers.crypto import Keyring, Wrap
from providers.errors import CredentialUnavailable
from providers.fields import raw
from providers.models.keyring import Keyring as KeyringRow
from providers.models.provider import ApiKey

_opened_at: datetime | None = None
"""The `updated_at` of the row that the process's keyring came from."""


class WrongEncryptionKey(Exception):
    """The setting does not open the keyring of this database. One line, fit for the terminal."""


def load() -> Keyring:
    """Open the stored keyring with the configured key, check the canary, and make it the process's.

    Raises WrongEncryptionKey when the key is missing or not the one of this database; nothing is modified.
    """
    row = KeyringRow.objects.first()
    if row is None:
        raise WrongEncryptionKey("PENSTOCK_ENCRYPTION_KEY: there is no keyring yet; run manage.py migrate")
    return _open(row)


def load_if_changed() -> None:
    """`load`, unless the stored keyring is the one that this process opened last: stretching a key takes a while."""
    stamp = KeyringRow.objects.values_list("updated_at", flat=True).first()
    if stamp is None or stamp != _opened_at:
        load()


def current() -> Keyring:
    """The keyring as it is stored now; for everything but the data plane, which refreshes its own."""
    load_if_changed()
    return crypto.current_keyring()


def load_if_stored() -> None:
    """`load`, but a database without the keyring's table or row, as before the first migrate, is fine."""
    try:
        row = KeyringRow.objects.first()
    except DatabaseError:
        return
    if row is not None:
        _open(row)


def ensure() -> Keyring:
    """The stored keyring, made now if this database has none yet."""
    row = KeyringRow.objects.first()
    if row is None:
        _require_key()
        keyring = Keyring.fresh()
        KeyringRow.objects.bulk_create([KeyringRow(**_columns(keyring))], ignore_conflicts=True)
        row = KeyringRow.objects.get()
    return _open(row)


def _use(keyring: Keyring, row: KeyringRow) -> None:
    global _opened_at  # noqa: PLW0603 - a process has one keyring
    crypto.install(keyring)
    _opened_at = row.updated_at


def _open(row: KeyringRow) -> Keyring:
    _require_key()
    for stored in row.wraps:
        keyring = crypto.unwrap(Wrap(**stored), settings.PENSTOCK_ENCRYPTION_KEY)
        if keyring is not None:
            _check_canary(keyring, row)
            _use(keyring, row)
            return keyring
    raise WrongEncryptionKey("PENSTOCK_ENCRYPTION_KEY: is not the key that this database was sealed with")


def _require_key() -> None:
    if not settings.PENSTOCK_ENCRYPTION_KEY:
        raise WrongEncryptionKey(
            "PENSTOCK_ENCRYPTION_KEY: is missing or wrong; write base64url of at least 32 random bytes"
        )


def _check_canary(keyring: Keyring, row: KeyringRow) -> None:
    try:
        value = keyring.open(raw(row.canary), aad=crypto.CANARY_AAD)
    except CredentialUnavailable as error:
        raise WrongEncryptionKey(
            "PENSTOCK_ENCRYPTION_KEY: opens the keyring, but not the canary in it"
        ) from error
    if value.reveal() != crypto.CANARY:
        raise WrongEncryptionKey("PENSTOCK_ENCRYPTION_KEY: the canary in the keyring was changed")


def _columns(keyring: Keyring) -> dict[str, object]:
    """The row's columns: the keyring wrapped under the configured key, and under the next one while it is announced."""
    keys = [settings.PENSTOCK_ENCRYPTION_KEY, settings.PENSTOCK_NEW_ENCRYPTION_KEY]
    wraps = [crypto.wrap(keyring, key) for key in dict.fromkeys(keys) if key]
    return {
        "wraps": [{"salt": each.salt, "rounds": each.rounds, "blob": each.blob} for each in wraps],
        "canary": keyring.seal(crypto.CANARY, aad=crypto.CANARY_AAD),
        "primary_kid": keyring.primary,
    }


def replace(keyring: Keyring) -> None:
    """Store a changed keyring (a key added or retired), and use it once that is certain. Inside `audit.changes`."""
    row = KeyringRow.objects.select_for_update().get()
    for name, value in _columns(keyring).items():
        setattr(row, name, value)
    row.save()
    transaction.on_commit(lambda: _use(keyring, row))


def foreign_wraps() -> int:
    """How many times the stored keyring is wrapped under an encryption key that is not configured here."""
    keys = [key for key in (settings.PENSTOCK_ENCRYPTION_KEY, settings.PENSTOCK_NEW_ENCRYPTION_KEY) if key]
    wraps = [Wrap(**stored) for stored in KeyringRow.objects.get().wraps]
    return sum(all(crypto.unwrap(each, key) is None for key in keys) for each in wraps)


# -- the sealed values -------------------------------------------------------------------------------------------------


def sealed_under(key: ApiKey) -> str:
    """The id of the data key that this row's value is sealed under; empty when it is no sealed value."""
    return crypto.key_id(raw(key.secret))


def problem(key: ApiKey) -> str:
    """Why this row's value does not open for its row and its provider's address; nothing when it does."""
    try:
        crypto.current_keyring().open(raw(key.secret), aad=aad_of(key))
    except CredentialUnavailable as error:
        return error.detail or error.text
    return ""


def resealed(key: ApiKey) -> str:
    """The same value sealed under the primary key. Raises CredentialUnavailable."""
    ring = crypto.current_keyring()
    aad = aad_of(key)
    return ring.seal(ring.open(raw(key.secret), aad=aad).reveal(), aad=aad)


def aad_of(key: ApiKey) -> bytes:
    """What the value of a key belongs to: its row, and the origin it may be sent to."""
    try:
        origin = key.provider.origin
    except ValueError as error:
        raise CredentialUnavailable(detail="the address of its provider is no address") from error
    return crypto.aad_for("providers.apikey", "secret", str(key.uid), origin)
