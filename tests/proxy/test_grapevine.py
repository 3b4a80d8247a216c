"""Workers hear of each other's open circuits and resting keys, and of nothing else."""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from proxy.grapevine import GONE_SECONDS, HASH, STALE_SECONDS, Grapevine, Hearsay
from tests.support.ports import free_port
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as running:
        yield running


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url) as connected:
        connected.flushall()
        yield connected


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def two(valkey: Valkey, client: redis.Redis, clock: Clock) -> Iterator[tuple[Grapevine, Grapevine]]:
    one, other = Grapevine(valkey.url, clock=clock), Grapevine(valkey.url, clock=clock)
    yield one, other
    one.close()
    other.close()


SEEN = Hearsay({7: 30.0}, {3: 12.0, -7: 2.5})


def test_what_one_worker_saw_the_other_hears_and_itself_does_not(two: tuple[Grapevine, Grapevine]) -> None:
    one, other = two
    assert not one.swap(SEEN)
    heard = other.swap(Hearsay())
    assert (heard.circuits, heard.keys) == (SEEN.circuits, SEEN.keys)


def test_it_fades_with_time_and_is_taken_back_when_it_is_over(
    two: tuple[Grapevine, Grapevine], clock: Clock
) -> None:
    one, other = two
    one.swap(SEEN)
    heard = other.swap(Hearsay())
    assert heard.left(clock.now + 10) == ({7: 20.0}, {3: 2.0})
    one.swap(Hearsay())
    assert not other.swap(Hearsay())


def test_the_longest_word_counts(two: tuple[Grapevine, Grapevine], valkey: Valkey) -> None:
    one, other = two
    one.swap(Hearsay({7: 5.0}))
    other.swap(Hearsay({7: 50.0}))
    assert Grapevine(valkey.url).swap(Hearsay()).circuits == {7: 50.0}


def test_a_worker_that_says_nothing_new_is_not_listened_to_and_at_last_forgotten(
    two: tuple[Grapevine, Grapevine], clock: Clock, client: redis.Redis
) -> None:
    one, other = two
    one.swap(SEEN)
    assert other.swap(Hearsay())
    clock.now += STALE_SECONDS
    assert not other.swap(Hearsay())
    clock.now += GONE_SECONDS
    other.swap(Hearsay())
    assert not client.hlen(HASH)


@pytest.mark.parametrize(
    "forged",
    [
        b"",
        b"\x00\xff",
        pickle.dumps({"c": {"7": 30}}),
        b"[" * 60_000,
        b"x" * 100_000,
        json.dumps(["c"]).encode(),
        json.dumps({"c": [7], "k": "all"}).encode(),
        json.dumps({"c": {"7": "long", "x": 5, "": 1, "9": -1, "8": True, "1" * 30: 5}}).encode(),
        b'{"c": {"7": NaN, "8": Infinity}}',
    ],
)
def test_r56_what_is_no_hearsay_is_passed_over(
    two: tuple[Grapevine, Grapevine], client: redis.Redis, forged: bytes
) -> None:
    client.hset(HASH, "somebody", forged)
    assert not two[0].swap(Hearsay())


def test_nobody_is_believed_for_longer_than_five_minutes(
    two: tuple[Grapevine, Grapevine], client: redis.Redis
) -> None:
    client.hset(HASH, "somebody", json.dumps({"n": 1, "c": {"7": 1e8}}))
    assert two[0].swap(Hearsay()).circuits == {7: 300.0}


def test_a_key_of_another_kind_is_no_error(two: tuple[Grapevine, Grapevine], client: redis.Redis) -> None:
    client.set(HASH, "text")
    assert not two[0].swap(SEEN)


def test_without_redis_nothing_is_heard_and_it_is_asked_again_only_after_a_while() -> None:
    clock = Clock()
    vine = Grapevine(f"redis://127.0.0.1:{free_port()}/0", clock=clock)
    asked: list[Hearsay] = []

    def refuse(ours: Hearsay) -> Any:
        asked.append(ours)
        raise redis.ConnectionError

    vine._exchange = refuse  # type: ignore[method-assign]  # the count of questions is what this is about
    assert not vine.swap(SEEN) and not vine.swap(SEEN)
    assert len(asked) == 1
    clock.now += 5
    vine.swap(SEEN)
    assert len(asked) == 2


def test_whatever_redis_says_to_the_clearing_up_is_no_error(
    two: tuple[Grapevine, Grapevine], clock: Clock, client: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It runs in the thread that keeps the configuration fresh."""
    one, other = two
    one.swap(SEEN)
    other.swap(Hearsay())
    clock.now += GONE_SECONDS + 1

    def refuse(*words: Any) -> Any:
        raise redis.exceptions.ReadOnlyError

    monkeypatch.setattr(redis.Redis, "hdel", refuse)
    assert not other.swap(Hearsay())
