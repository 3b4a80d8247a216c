from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.inprocess import PEPPERS, House
from tests.support.upstream import Upstream


@pytest.fixture
def house(tmp_path: Path, settings: Any) -> Iterator[House]:
    """A data plane with one gateway key and no provider."""
    settings.PENSTOCK_PEPPERS = PEPPERS
    with House(tmp_path) as running:
        yield running


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture
def fallback() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture
def pair(house: House, upstream: Upstream, fallback: Upstream) -> House:
    """A data plane whose active provider is `upstream`, with `fallback` behind it."""
    first = house.provide("first", f"{upstream.url}/v1", models=("tiny",))
    second = house.provide("second", f"{fallback.url}/v1", models=("big",))
    house.activate((first, "tiny"), (second, "big"))
    return house
