"""Sealing what callers said and were answered: for texts that are kept in the database, and for answers that wait in Redis.

Texts are sealed like the keys of providers, under the keyring's primary key, and are rewrapped with them. What waits in Redis lives
for minutes: its keys are derived from the primary key, so after a rotation it is simply not found any more.
"""

from __future__ import annotations

import functools
import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from providers import crypto

NONCE_BYTES = 12


def seal(text: str, *, model: str, field: str, uid: str) -> str:
    """`text` sealed for this field of this row. Raises KeyringUnavailable."""
    return crypto.current_keyring().seal(text, aad=crypto.aad_for(model, field, uid))


def unseal(sealed: str, *, model: str, field: str, uid: str) -> str:
    """Raises CredentialUndecryptable when it was changed, or sealed for another row."""
    return crypto.current_keyring().open(sealed, aad=crypto.aad_for(model, field, uid)).reveal()


def sealed_under(sealed: str) -> str:
    """The id of the data key."""
    return crypto.key_id(sealed)


def hidden_name(text: bytes) -> str:
    """A name that says "the same text" to every process with our keyring, and nothing to anybody else."""
    return hmac.digest(_derived()[0], text, "sha256").hex()


def seal_value(value: bytes, *, name: str) -> bytes:
    """`value` sealed for the place called `name`."""
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + _derived()[1].encrypt(nonce, value, name.encode())


def unseal_value(sealed: bytes, *, name: str) -> bytes | None:
    """The value; None when it was changed, moved, or sealed under another key."""
    try:
        return _derived()[1].decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], name.encode())
    except (InvalidTag, ValueError):
        return None


def _derived() -> tuple[bytes, AESGCM]:
    ring = crypto.current_keyring()
    return _keys_of(ring.keys[ring.primary])


@functools.lru_cache(maxsize=4)
def _keys_of(data_key: bytes) -> tuple[bytes, AESGCM]:
    """The keys for names and for values. The data key is random, so one round of HMAC is all the derivation that is needed."""
    names, values = (hmac.digest(data_key, label, "sha256") for label in (b"cache|names", b"cache|values"))
    return names, AESGCM(values)
