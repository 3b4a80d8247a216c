"""Whether a stream that breaks is gone on with: the request's header decides, else the key, else the configuration."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import faults, prefill
from tests.support.inprocess import House
from tests.support.told import Told, listen
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

LONG = prefill.LONG.text
STRICT, ACTIVE = "strict", "auto"
"""A route that does not let streams be resumed, and the active provider, which has a fallback."""

Ask = Callable[..., Told]


@pytest.fixture
def ask(pair: House, upstream: Upstream, fallback: Upstream) -> Ask:
    """Ask `model` with a key that has this switch and with this header; the first provider breaks in the middle."""
    pair.route(STRICT, 1, 2, strategy="failover", resume=False)
    pair.route("lenient", 1, 2, strategy="failover", resume=True)
    pair.route("unsaid", 1, 2, strategy="failover")
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.continuing())

    def one(model: str, *, key: bool | None = None, header: str | None = None) -> Told:
        headers = {} if header is None else {"x-penstock-resume": header}
        whole = pair.issue("switched", resume=key)
        told = listen(pair.url, whole, "r-1", model=model, headers=headers, temperature=0)
        told.check(whole_text=LONG)
        return told

    return one


def assert_honest_error(told: Told, fallback: Upstream) -> None:
    assert (told.code, told.closed) == ("upstream_interrupted", True)
    assert told.text == LONG[: len(told.text)] != LONG
    assert not fallback.ledger.asked


def assert_resumed(told: Told, fallback: Upstream) -> None:
    assert told.ended_well and told.text == LONG
    assert len(fallback.ledger.asked) == 1


def test_a_key_says_for_all_of_its_streams_whether_they_are_resumed(ask: Ask, fallback: Upstream) -> None:
    assert_honest_error(ask(ACTIVE, key=False), fallback)
    assert_resumed(ask(ACTIVE, key=None), fallback)


def test_the_header_beats_the_key(ask: Ask, fallback: Upstream) -> None:
    assert_honest_error(ask(ACTIVE, key=True, header="off"), fallback)
    assert_resumed(ask(ACTIVE, key=False, header="on"), fallback)


def test_the_key_beats_the_route(ask: Ask, fallback: Upstream) -> None:
    assert_honest_error(ask("lenient", key=False), fallback)
    assert_resumed(ask(STRICT, key=True), fallback)


def test_the_header_beats_the_route(ask: Ask, fallback: Upstream) -> None:
    assert_honest_error(ask("lenient", header="off"), fallback)
    assert_resumed(ask(STRICT, header="on"), fallback)


@pytest.mark.parametrize("model", ["lenient", "unsaid"])
def test_a_route_decides_where_nobody_else_does(ask: Ask, fallback: Upstream, model: str) -> None:
    assert_honest_error(ask(STRICT), fallback)
    assert_resumed(ask(model), fallback)


def test_a_header_that_says_neither_on_nor_off_says_nothing(ask: Ask, fallback: Upstream) -> None:
    assert_honest_error(ask(ACTIVE, key=False, header="perhaps"), fallback)
