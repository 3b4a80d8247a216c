"""F35: the wall clock jumps while requests run. Nothing that is measured or waited for looks at it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import time_machine

from tests.support import answers
from tests.support.inprocess import House
from tests.support.told import Told, listen
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database


@pytest.mark.parametrize("seconds", [3600, -3600])
def test_f35_a_stream_is_neither_cut_nor_measured_wrongly(
    pair: House, upstream: Upstream, seconds: int
) -> None:
    upstream.behave(answers.ok(chunks=10, delay=0.05))
    told: list[Told] = []
    listening = threading.Thread(target=lambda: told.append(listen(pair.url, pair.key, "jump")))
    listening.start()
    upstream.ledger.wait_for(lambda ledger: ledger.asked)
    with time_machine.travel(time.time() + seconds, tick=True):
        listening.join(10)
    assert told[0].ended_well
    record = pair.records()[0]
    assert 300 <= record["duration_ms"] < 5000
    assert 0 <= record["ttft_ms"] < 5000
    assert [each["total"] for each in record["trace"]["attempts"]] == [record["duration_ms"]]


@pytest.fixture
def an_hour_later() -> Iterator[None]:
    with time_machine.travel(time.time() + 3600, tick=True):
        yield


def test_f35_limits_and_requests_go_on_after_the_jump(
    house: House, upstream: Upstream, an_hour_later: None
) -> None:
    house.provide("first", f"{upstream.url}/v1")
    assert house.ask("tiny", key=house.issue("limited", requests_per_minute=5)).status_code == 200
