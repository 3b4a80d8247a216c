"""Where the value of a credential comes from.

What a row holds is always sealed for its row and origin. What is sealed is either the value itself, or a reference
(`env://NAME`, `file:///path`) to where the value is; so a reference, too, works for no other row and no other origin.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from providers.crypto import Secret
from providers.errors import CredentialUnavailable
from providers.secret_stores.env import EnvStore
from providers.secret_stores.file import FileStore


class SecretStore(Protocol):
    """Reads the value that a reference names."""

    async def read(self, reference: str) -> Secret:
        """`reference` is what follows the scheme. Raises CredentialUnavailable; never returns an empty value."""
        ...


STORES: Mapping[str, SecretStore] = MappingProxyType({"env": EnvStore(), "file": FileStore()})
_NOT_YET = frozenset({"vault", "op"})


def store_of(value: str) -> tuple[SecretStore, str] | None:
    """The store and its reference when `value` is a reference, None when it is the secret itself."""
    scheme, found, reference = value.partition("://")
    if found and scheme in _NOT_YET:
        raise CredentialUnavailable(detail=f"{scheme}:// references cannot be read by this version")
    store = STORES.get(scheme) if found else None
    return None if store is None else (store, reference)
