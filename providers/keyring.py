"""The keyring's row: made once, opened at start, rotated online."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.db import DatabaseError

from providers import crypto
from providers.crypto import Keyring, Wrap
from providers.errors import CredentialUnavailable
from providers.fields import raw
from providers.models.keyring import Keyring as KeyringRow


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


def _open(row: KeyringRow) -> Keyring:
    global _opened_at
    _require_key()
    for stored in row.wraps:
        keyring = crypto.unwrap(Wrap(**stored), settings.PENSTOCK_ENCRYPTION_KEY)
        if keyring is not None:
            _check_canary(keyring, row)
            crypto.install(keyring)
            _opened_at = row.updated_at
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
        raise WrongEncryptionKey("PENSTOCK_ENCRYPTION_KEY: opens the keyring, but not the canary in it") from error
    if value.reveal() != crypto.CANARY:
        raise WrongEncryptionKey("PENSTOCK_ENCRYPTION_KEY: the canary in the keyring was changed")


def _columns(keyring: Keyring) -> dict[str, object]:
    """The row's columns: the keyring wrapped under the configured key, and under the next one while it is announced."""
    keys = [settings.PENSTOCK_ENCRYPTION_KEY, settings.PENSTOCK_NEW_ENCRYPTION_KEY]
    wraps = [crypto.wrap(keyring, key) for key in keys if key]
    return {
        "wraps": [{"salt": each.salt, "rounds": each.rounds, "blob": each.blob} for each in wraps],
        "canary": keyring.seal(crypto.CANARY, aad=crypto.CANARY_AAD),
        "primary_kid": keyring.primary,
    }


def replace(keyring: Keyring) -> None:
    """Store a changed keyring (a key added or retired) and use it. Inside `audit.changes`."""
    row = KeyringRow.objects.select_for_update().get()
    for name, value in _columns(keyring).items():
        setattr(row, name, value)
    row.save()
    crypto.install(keyring)
