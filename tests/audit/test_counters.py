"""The counters of the control plane's throttle: shared through Redis, and kept by the process while Redis is away."""

from __future__ import annotations

import pytest
from redis import Redis

from audit.counters import Counters
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database
LIMIT, WINDOW = 3, 60


class Clock:
    def __init__(self) -> None:
        self.now = 6_000_000.0

    def __call__(self) -> float:
        return self.now


def take(counters: Counters, times: int = 1, name: str = "user:1") -> list[float | None]:
    return [counters.take(name, limit=LIMIT, window=WINDOW) for _ in range(times)]


def test_two_processes_count_together() -> None:
    clock = Clock()
    with Valkey() as valkey:
        one, other = Counters(valkey.url, clock=clock), Counters(valkey.url, clock=clock)

        assert [*take(one, 2), *take(other, 1)] == [None, None, None]
        assert take(other)[0] and take(one)[0]
        assert take(one, name="user:2") == [None]


def test_a_process_counts_by_itself_while_redis_is_away_and_nobody_waits_for_that() -> None:
    clock = Clock()
    with Valkey() as valkey:
        counters = Counters(valkey.url, clock=clock)
    assert take(counters, 3) == [None] * 3
    assert take(counters)[0]


def test_a_value_in_redis_that_is_no_number_changes_nothing_for_the_caller() -> None:
    clock = Clock()
    with Valkey() as valkey:
        counters = Counters(valkey.url, clock=clock)
        take(counters)
        client = Redis.from_url(valkey.url)
        for name in client.keys("penstock:throttle:*"):
            client.set(name, b"cos\nsystem\n(S'true'\ntR.")
        assert take(counters, 3) == [None] * 3
        assert take(counters)[0]


@pytest.mark.parametrize("elapsed", [0, 17, 59])
def test_what_is_told_to_wait_is_enough_and_no_more(elapsed: int) -> None:
    clock = Clock()
    clock.now += elapsed
    counters = Counters("", clock=clock)
    take(counters, LIMIT)
    wait = take(counters)[0]
    assert wait is not None and 0 < wait <= 2 * WINDOW

    clock.now += wait - 0.5
    assert take(counters)[0]
    clock.now += 0.6
    assert take(counters) == [None]


def test_refused_requests_do_not_count() -> None:
    clock = Clock()
    counters = Counters("", clock=clock)
    take(counters, 50)

    clock.now += 2 * WINDOW
    assert take(counters, LIMIT) == [None] * LIMIT
