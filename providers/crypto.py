"""Sealing: AES-256-GCM under a random data key of a keyring, the keyring wrapped by a key from the environment.

Layers, from the outside in:

* `PENSTOCK_ENCRYPTION_KEY` (32 random bytes or more) is stretched by PBKDF2-HMAC-SHA256 with a stored random salt;
* the result wraps the keyring, a JSON object of random data keys by random id, as a whole;
* a data key seals one value, with what the value belongs to as associated data, so that a ciphertext copied to another
  row, or met by a changed base URL, does not open.

A sealed value is the text `v1.<key id>.<base64url of nonce + ciphertext + tag>`. Nothing here is cached but the
keyring itself; an opened value lives as long as the call that needed it.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from providers.errors import CredentialUndecryptable, KeyringUnavailable

ROUNDS = 600_000
DOTS = "••••"
CANARY = "penstock canary"
CANARY_AAD = b"providers.keyring|canary"
WRAP_AAD = b"providers.keyring|wrapped"


class Secret:
    """A secret that prints as dots wherever it is printed. `reveal()` is for the one line that uses it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def reveal(self) -> str:
        return self._value

    def __repr__(self) -> str:
        return DOTS

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return DOTS

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and hmac.compare_digest(self._value.encode(), other._value.encode())

    __hash__ = None  # type: ignore[assignment]  # a secret is never a key of anything

    def __reduce__(self) -> Any:
        raise TypeError("a secret is not pickled")


def aad_for(model: str, field: str, uid: str, origin: str = "") -> bytes:
    """Associated data: what a sealed value belongs to, and the origin it may be sent to."""
    return f"{model}|{field}|{uid}|{origin}".encode()


@dataclass(frozen=True, slots=True, repr=False)
class Keyring:
    """The unwrapped data keys, by id; new values are sealed under `primary`.

    marker: the key of fingerprints. It seals nothing and is never rotated, so fingerprints stay comparable for ever.
    """

    primary: str
    keys: Mapping[str, bytes]
    marker: bytes

    @classmethod
    def fresh(cls) -> Keyring:
        return cls("", {}, secrets.token_bytes(32)).with_new_key()

    def with_new_key(self) -> Keyring:
        """This keyring and one more data key, under which values are sealed from now on."""
        kid = secrets.token_hex(4)
        return Keyring(kid, {**self.keys, kid: secrets.token_bytes(32)}, self.marker)

    def without(self, kid: str) -> Keyring:
        return Keyring(
            self.primary, {each: key for each, key in self.keys.items() if each != kid}, self.marker
        )

    def seal(self, plaintext: str, *, aad: bytes) -> str:
        nonce = secrets.token_bytes(12)
        sealed = AESGCM(self.keys[self.primary]).encrypt(nonce, plaintext.encode(), aad)
        return f"v1.{self.primary}.{_b64(nonce + sealed)}"

    def open(self, sealed: str, *, aad: bytes) -> Secret:
        """The value; CredentialUndecryptable when the key is gone, or anything about it was changed."""
        key = self.keys.get(key_id(sealed))
        if key is None:
            raise CredentialUndecryptable(detail="sealed under a key that is not in the keyring")
        try:
            nonce, data = _ciphertext(sealed)
            return Secret(_cipher(key).decrypt(nonce, data, aad).decode())
        except (InvalidTag, ValueError, binascii.Error) as error:
            raise CredentialUndecryptable(
                detail="the sealed value was changed or belongs elsewhere"
            ) from error

    def fingerprint(self, plaintext: str) -> str:
        """A keyed hash that says "the same secret" and nothing else."""
        return hmac.new(self.marker, b"fingerprint|" + plaintext.encode(), hashlib.sha256).hexdigest()[:24]


@functools.lru_cache(maxsize=1024)
def _ciphertext(sealed: str) -> tuple[bytes, bytes]:
    """Nonce and ciphertext of a sealed value. Each request needs its own again, and this much of it is no secret."""
    data = _unb64(sealed.removeprefix(f"v1.{key_id(sealed)}."))
    return data[:12], data[12:]


@functools.lru_cache(maxsize=1024)
def key_id(sealed: str) -> str:
    """The id of the data key that a value is sealed under; empty when it is no sealed value."""
    version, _, rest = sealed.partition(".")
    return rest.partition(".")[0] if version == "v1" else ""


@dataclass(frozen=True, slots=True)
class Wrap:
    """A keyring sealed under one encryption key, as it is stored (base64url)."""

    salt: str
    rounds: int
    blob: str


def wrap(keyring: Keyring, encryption_key: bytes, *, rounds: int = ROUNDS) -> Wrap:
    salt, nonce = secrets.token_bytes(16), secrets.token_bytes(12)
    keys = {kid: _b64(key) for kid, key in keyring.keys.items()}
    text = json.dumps({"primary": keyring.primary, "keys": keys, "marker": _b64(keyring.marker)})
    blob = AESGCM(_stretch(encryption_key, salt, rounds)).encrypt(nonce, text.encode(), WRAP_AAD)
    return Wrap(_b64(salt), rounds, _b64(nonce + blob))


def unwrap(stored: Wrap, encryption_key: bytes) -> Keyring | None:
    """The keyring, or None when this encryption key is not the one that wrapped it."""
    try:
        data = _unb64(stored.blob)
        key = _stretch(encryption_key, _unb64(stored.salt), stored.rounds)
        content = json.loads(AESGCM(key).decrypt(data[:12], data[12:], WRAP_AAD))
        keys = {kid: _unb64(text) for kid, text in content["keys"].items()}
        # Keyrings of the first days had no marker and used their oldest key for it.
        marker = _unb64(content["marker"]) if "marker" in content else next(iter(keys.values()))
        return Keyring(content["primary"], keys, marker)
    except (InvalidTag, ValueError, KeyError, StopIteration, binascii.Error):
        return None


@functools.lru_cache(maxsize=32)
def _cipher(key: bytes) -> AESGCM:
    """The cipher of a data key, whose key schedule is worth keeping; the data keys are in memory anyway."""
    return AESGCM(key)


_keyring: Keyring | None = None


def install(keyring: Keyring | None) -> None:
    """Make `keyring` the one this process uses (None: none)."""
    global _keyring  # noqa: PLW0603 - a process has one keyring
    _keyring = keyring


def current_keyring() -> Keyring:
    """The process's keyring; KeyringUnavailable before one was loaded."""
    if _keyring is None:
        raise KeyringUnavailable(detail="no keyring was loaded")
    return _keyring


def _stretch(encryption_key: bytes, salt: bytes, rounds: int) -> bytes:
    return hashlib.pbkdf2_hmac("sha256", encryption_key, salt, rounds, 32)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode()


def _unb64(text: str) -> bytes:
    return base64.urlsafe_b64decode(text)
