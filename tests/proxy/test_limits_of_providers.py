"""Limits of providers' keys: a key that has reached its own is passed over, and nobody is blamed for it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import redis

from providers.wire import Quota
from tests.support import answers, faults, prefill
from tests.support.inprocess import PEPPERS, House
from tests.support.told import listen
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database


def used(upstream: Upstream) -> Counter[str]:
    """How often each of the provider's keys was used."""
    return Counter(
        record.headers["authorization"].removeprefix("Bearer ") for record in upstream.ledger.asked
    )


@pytest.fixture
def first(house: House, upstream: Upstream) -> int:
    """A provider whose two keys take two requests a minute and any number."""
    number = house.provide("first", f"{upstream.url}/v1", key="")
    house.add_key(number, "sk-narrow", quota=Quota(requests=2))
    house.add_key(number, "sk-wide")
    house.activate((number, "tiny"))
    return number


def test_a_key_that_has_reached_its_limit_is_passed_over_for_the_next_of_its_provider(
    house: House, upstream: Upstream, first: int
) -> None:
    answered = [house.ask(None) for _ in range(8)]
    assert [answer.status_code for answer in answered] == [200] * 8
    assert {answer.headers["x-penstock-attempts"] for answer in answered} == {"1"}
    assert used(upstream) == {"sk-narrow": 2, "sk-wide": 6}
    records = house.records(8)
    assert {record["status"] for record in records} == {"success"}
    passed = [
        each for record in records for each in record["trace"]["attempts"] if each["outcome"] != "success"
    ]
    assert passed[0] == {"to": "first/tiny", "key": "key-100", "outcome": "key_limit_reached"}
    assert house.gateway.breakers.open() == {}
    assert house.gateway.cooldowns.resting() == {}


def test_then_for_the_next_candidate_and_at_last_it_is_429_with_the_shortest_wait(
    house: House, upstream: Upstream, fallback: Upstream
) -> None:
    one = house.provide("first", f"{upstream.url}/v1", key="")
    two = house.provide("second", f"{fallback.url}/v1", key="", models=("big",))
    house.add_key(one, "sk-one", quota=Quota(requests=1))
    house.add_key(two, "sk-two", quota=Quota(requests=2))
    house.activate((one, "tiny"), (two, "big"))

    answered = [house.ask(None) for _ in range(5)]

    assert [answer.status_code for answer in answered] == [200, 200, 200, 429, 429]
    assert [answer.headers.get("x-penstock-provider") for answer in answered[:3]] == [
        "first",
        "second",
        "second",
    ]
    refused = answered[-1]
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    # `second` is free when half of its two have faded; `first` only when all of its one have.
    assert 29 <= int(refused.headers["retry-after"]) <= 91
    assert len(house.records(3)) == 3
    assert len(upstream.ledger.asked) + len(fallback.ledger.asked) == 3


def test_a_failure_before_it_is_told_rather_than_the_limit(
    house: House, upstream: Upstream, fallback: Upstream
) -> None:
    one = house.provide("first", f"{upstream.url}/v1")
    two = house.provide("second", f"{fallback.url}/v1", key="", models=("big",))
    house.add_key(two, "sk-two", quota=Quota(requests=1))
    house.activate((one, "tiny"), (two, "big"))
    upstream.behave(answers.status(500))
    assert [house.ask(None).status_code for _ in range(2)] == [200, 502]
    upstream.behave(answers.status(404))
    assert house.ask(None).status_code == 429  # who was passed over might have had the model


def test_no_dial_is_counted_for_a_key_that_was_passed_over(house: House, upstream: Upstream) -> None:
    number = house.provide("first", f"{upstream.url}/v1", key="")
    for n in range(6):
        house.add_key(number, f"sk-{n}", quota=Quota(requests=1))
    house.activate((number, "tiny"))
    assert [house.ask(None).status_code for _ in range(7)] == [200] * 6 + [429]
    assert set(used(upstream).values()) == {1}


def test_the_tokens_of_a_providers_key_are_corrected_when_the_answer_ends(
    house: House, upstream: Upstream
) -> None:
    number = house.provide("first", f"{upstream.url}/v1", key="")
    house.add_key(number, "sk-one", quota=Quota(tokens=100))
    house.activate((number, "tiny"))
    upstream.behave(answers.ok(chunks=90))
    assert house.ask(None).status_code == 200  # estimated by its few bytes
    assert house.ask(None).status_code == 429
    assert len(upstream.ledger.asked) == 1


def test_no_more_run_at_the_same_time_than_a_providers_key_takes(
    house: House, upstream: Upstream, fallback: Upstream
) -> None:
    one = house.provide("first", f"{upstream.url}/v1", key="")
    two = house.provide("second", f"{fallback.url}/v1", models=("big",))
    house.add_key(one, "sk-one", quota=Quota(running=2))
    house.activate((one, "tiny"), (two, "big"))
    upstream.behave(answers.ok(chunks=1000, delay=0.02))
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(house.ask, None, stream=True) for _ in range(2)]
        upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == 2)
        assert {house.ask(None).headers["x-penstock-provider"] for _ in range(3)} == {"second"}
        upstream.behave(answers.ok())
        upstream.drop_connections()
        assert [each.result().status_code for each in running] == [200, 200]
    assert house.ask(None).headers["x-penstock-provider"] == "first"


def test_a_stream_that_broke_is_gone_on_with_by_somebody_whose_key_has_room(
    house: House, upstream: Upstream, fallback: Upstream
) -> None:
    one = house.provide("first", f"{upstream.url}/v1", key="")
    two = house.provide("second", f"{fallback.url}/v1", key="", models=("big",))
    house.add_key(one, "sk-one", quota=Quota(requests=2))
    house.add_key(two, "sk-two", quota=Quota(requests=1))
    house.activate((one, "tiny"), (two, "big"))
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.continuing())
    told = listen(house.url, house.key, "r-1", model="auto", temperature=0)
    assert told.ended_well and told.text == prefill.LONG.text
    told = listen(house.url, house.key, "r-2", model="auto", temperature=0)  # nobody is left who has room
    assert (told.code, told.closed) == ("upstream_interrupted", True)


@pytest.fixture
def shared(tmp_path: Path, settings: Any) -> Any:
    settings.PENSTOCK_PEPPERS = PEPPERS
    with (
        Valkey() as valkey,
        House(tmp_path, redis_url=valkey.url) as house,
        redis.Redis.from_url(valkey.url) as client,
    ):
        yield house, client


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


def test_redis_counts_a_providers_key_for_all_processes_and_is_not_asked_for_the_others(
    shared: tuple[House, redis.Redis], upstream: Upstream
) -> None:
    house, client = shared
    free = house.provide("free", f"{upstream.url}/v1", models=("free",))
    number = house.provide("first", f"{upstream.url}/v1", key="")
    key_id = house.add_key(number, "sk-one", quota=Quota(requests=5, tokens=1000, running=3))
    assert house.ask("first/tiny").status_code == 200
    name = f"penstock:limit:{{api_key:{key_id}}}"
    tokens = sum(upstream_tokens(house))
    wait_for(lambda: client.hget(f"{name}:t", "c") == b"%d" % tokens)
    assert client.hget(f"{name}:r", "c") == b"1"
    assert client.zcard(f"{name}:c") == 0
    asked = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    assert house.ask("free/free").status_code == 200
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == asked
    assert free != number


def upstream_tokens(house: House) -> tuple[int, int]:
    record = house.records(1)[-1]
    return record["prompt_tokens"], record["completion_tokens"]


def test_the_tokens_of_every_attempt_count_for_the_key_that_called(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    """A stream that broke and was gone on with has cost twice."""
    key = pair.issue("counted", tokens_per_minute=100_000)
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.continuing())
    assert listen(pair.url, key, "r-1", model="auto", temperature=0).ended_well
    records = pair.records(2)
    assert min(record["completion_tokens"] for record in records) > 0
    total = sum(record["prompt_tokens"] + record["completion_tokens"] for record in records)
    (state,) = pair.gateway.limits._book._states.values()
    wait_for(lambda: state.admitted.tokens.current + state.admitted.tokens.previous == total)
