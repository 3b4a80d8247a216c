from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.gateway import Gateway
from tests.support.llama import Llama
from tests.support.valkey import Valkey


@pytest.fixture(scope="module")
def llama() -> Iterator[Llama]:
    with Llama(key="llama-secret-0123456789") as server:
        yield server


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(valkey: Valkey) -> Iterator[Gateway]:
    """The web process and the drainer, on the database of this run."""
    with Gateway(redis=valkey, programs=["drainer"]) as running:
        yield running
