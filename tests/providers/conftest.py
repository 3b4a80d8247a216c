"""Fixtures for tests of providers: the database's own keyring, and providers made the way people make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from audit.changes import changes
from providers import crypto, keyring, keys
from providers.errors import ProviderError
from providers.fields import raw
from providers.models import Keyring, Provider
from tests.support.upstream import Upstream


@pytest.fixture
def ring(db: None) -> crypto.Keyring:
    """The keyring of the test database, in use; other tests may have put another one in its place."""
    row = Keyring.objects.first()
    try:
        if row is not None:
            crypto.current_keyring().open(raw(row.canary), aad=crypto.CANARY_AAD)
            return keyring.current()
    except ProviderError:
        pass
    return keyring.ensure()


@pytest.fixture
def provide(ring: crypto.Keyring) -> Callable[..., Provider]:
    """Make a provider: `provide("tiny", url, api_key="...", kind="vllm")`."""

    def make(name: str, base_url: str, *, api_key: str = "", **fields: Any) -> Provider:
        with changes(actor=None, via="system"):
            provider = Provider.objects.create(name=name, base_url=base_url, **fields)
            if api_key:
                keys.write_default(provider, api_key)
        return provider

    return make


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running
