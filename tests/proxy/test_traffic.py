"""Requests counted by path: by one process, by several, with Redis and without, and never by what outsiders write."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from prometheus_client import REGISTRY

from proxy.traffic import BOUNDS_MS, MOST_LABELS, MOST_RECENT, Counts, Row, Traffic, counted
from proxy.traffic_store import PREFIX, RECENT
from tests.support import faults
from tests.support.inprocess import House
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with Valkey() as running:
        yield running


@pytest.fixture
def valkey(server: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        yield client


def ask(house: House, key: str | None = None, **body: Any) -> httpx.Response:
    headers = {"x-api-key": key or house.key, "x-request-id": "mine"}
    return httpx.post(f"{house.url}/v1/chat/completions", json={**HELLO, **body}, headers=headers, timeout=30)


def counts_of(house: House, count: int) -> Counts:
    """What the house counted, once it has counted so many: a caller has the answer a moment before."""
    deadline = time.monotonic() + 20
    while (counts := house.gateway.traffic.read()[0]).total().count < count:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return counts


def noted(traffic: Traffic, count: int = 1, *, status: int = 200, ms: float = 7) -> None:
    for _ in range(count):
        traffic.note("/a", "GET", status, time.monotonic() - ms / 1000, "id", gateway_key="app")


# -- the data plane ----------------------------------------------------------------------------------------------------


def test_the_data_plane_counts_its_requests_with_the_name_of_their_key(pair: House) -> None:
    ask(pair)
    ask(pair, key="pen_live_nonsense")
    httpx.get(f"{pair.url}/api/v1/models/tiny", headers={"x-api-key": pair.key})
    httpx.post(f"{pair.url}/v1/embeddings", headers={"x-api-key": pair.key}, json={})

    counts = counts_of(pair, 4)

    assert {label: (row.count, row.errors) for label, row in counts.rows.items()} == {
        "POST /v1/chat/completions": (2, 1),
        "GET /v1/models": (1, 0),
        "POST /v1/...": (1, 1),
    }
    chats = [each for each in counts.recent if each["path"] == "/v1/chat/completions"]
    assert [(each["status_code"], each["gateway_key"], each["request_id"]) for each in chats] == [
        (401, "", "mine"),
        (200, "first", "mine"),
    ]
    assert abs(chats[0]["timestamp"] - time.time()) < 30


def test_a_stream_that_broke_counts_as_an_error_although_it_began_with_200(house: House) -> None:
    with Upstream(faults.reset_after(2)) as upstream:
        number = house.provide("first", f"{upstream.url}/v1", models=("tiny",))
        house.activate((number, "tiny"))
        assert ask(house, stream=True).status_code == 200

        counts = counts_of(house, 1)

    assert counts.rows["POST /v1/chat/completions"].errors == 1
    assert counts.statuses == {502: 1}


def test_labels_and_metrics_do_not_grow_by_what_callers_write(pair: House) -> None:
    def series() -> set[tuple[str, tuple[tuple[str, str], ...]]]:
        return {
            (sample.name, tuple(sorted(sample.labels.items())))
            for family in REGISTRY.collect()
            for sample in family.samples
        }

    def hostile(word: str) -> None:
        ask(pair, model=word)
        ask(pair, model=f"first/{word}")
        ask(pair, provider_id=word)
        ask(pair, key=f"pen_live_{word}")
        ask(pair, stream=word)
        httpx.request("PROPFIND", f"{pair.url}/v1/chat/completions", headers={"x-api-key": pair.key})
        httpx.post(f"{pair.url}/v1/{word}", headers={"x-api-key": pair.key})
        httpx.get(f"{pair.url}/v1/models/{word}", headers={"x-api-key": pair.key, "x-request-id": word})

    hostile("seen")
    ask(pair)
    before, labels = series(), set(counts_of(pair, 9).rows)
    for number in range(20):
        hostile(f"unheard-of-{number}")
    ask(pair)

    assert set(counts_of(pair, 9 + 20 * 8 + 1).rows) == labels
    assert series() == before
    assert len(labels) <= 6


# -- arithmetic --------------------------------------------------------------------------------------------------------


def test_durations_are_told_from_buckets() -> None:
    row = Row()
    row.add([0.004] * 50 + [0.020] * 45 + [0.800] * 5, failed=False)

    assert (row.count, row.most_micros, sum(row.buckets)) == (100, 800_000, 100)
    assert row.micros == 50 * 4000 + 45 * 20_000 + 5 * 800_000
    assert 0 < row.quantile_ms(0.5) <= 5
    assert 10 < row.quantile_ms(0.95) <= 25
    assert 500 < row.quantile_ms(0.99) <= 800
    assert row.quantile_ms(1) == 800


def test_durations_beyond_the_last_bucket_and_on_its_edges_are_counted() -> None:
    row = Row()
    row.add([bound / 1000 for bound in BOUNDS_MS] + [1000.0, 0.0], failed=True)

    assert row.buckets == [2] + [1] * len(BOUNDS_MS)
    assert row.quantile_ms(0.999) <= 1_000_000
    assert Row().quantile_ms(0.5) == 0


def test_what_is_kept_is_bounded() -> None:
    entries = [(f"/{n}", "GET", 200, 0.0, 1.0, "", "", "") for n in range(2 * MOST_LABELS)]
    counts = counted(entries)

    assert len(counts.rows) == MOST_LABELS + 1
    assert counts.rows["other"].count == MOST_LABELS
    assert len(counts.recent) == MOST_RECENT
    assert counts.recent[0]["path"] == f"/{2 * MOST_LABELS - 1}"


def test_a_request_is_noted_with_one_call_and_no_lock() -> None:
    """The hot path may take five calls of Python functions; it would wait for ever if it took the lock of those who count."""
    traffic, calls = Traffic("redis://127.0.0.1:9/0"), []
    with traffic._counting:
        sys.setprofile(
            lambda frame, event, arg: calls.append(frame.f_code.co_name) if event == "call" else None
        )
        try:
            traffic.note("/a", "GET", 200, 0.0, "id", gateway_key="app")
        finally:
            sys.setprofile(None)

    assert calls == ["note"]


# -- between processes -------------------------------------------------------------------------------------------------


def test_workers_add_up_what_they_counted(server: Valkey, valkey: redis.Redis) -> None:
    one, other = Traffic(server.url), Traffic(server.url)
    noted(one, 3, ms=7)
    noted(other, 2, status=500, ms=400)
    one.publish()

    counts, shared = other.read()

    assert shared
    row = counts.rows["GET /a"]
    assert (row.count, row.errors, sum(row.buckets)) == (5, 2, 5)
    assert 400_000 <= row.most_micros < 5_000_000
    assert counts.statuses == {200: 3, 500: 2}
    assert [each["status_code"] for each in counts.recent] == [500, 500, 200, 200, 200]
    assert one.read()[0].rows == counts.rows
    one.publish()
    assert one.read()[0].rows == counts.rows
    assert all(0 < valkey.ttl(name) <= 2 * 86_400 for name in valkey.scan_iter(f"{PREFIX}*"))


def test_what_redis_did_not_take_is_told_when_it_is_back_and_meanwhile_each_knows_its_own(
    server: Valkey,
) -> None:
    with Valkey() as flaky:
        traffic = Traffic(flaky.url)
        traffic._store._clock = lambda: now
        now = 0.0
        noted(traffic)
        assert traffic.read()[1] is True
        flaky.kill()
        noted(traffic)
        counts, shared = traffic.read()
        assert (shared, counts.rows["GET /a"].count) == (False, 2)
        flaky.start()
        now = 10.0
        counts, shared = traffic.read()
        assert (shared, counts.rows["GET /a"].count) == (True, 1)


def test_a_redis_that_is_away_is_not_asked_at_every_turn() -> None:
    traffic = Traffic("redis://127.0.0.1:9/0")
    noted(traffic)
    traffic.publish()
    began = time.monotonic()
    for _ in range(1000):
        traffic.publish()
    assert time.monotonic() - began < 2
    assert traffic.read()[0].rows["GET /a"].count == 1


def test_r56_what_others_wrote_into_redis_is_passed_over(server: Valkey, valkey: redis.Redis) -> None:
    traffic = Traffic(server.url)
    noted(traffic)
    traffic.publish()
    day = next(name for name in valkey.scan_iter(f"{PREFIX}:2*") if b"longest" not in name)
    for field, value in {
        "GET /a\ncount": "1" * 40, "GET /a\n__class__": "1", "GET /b\ncount": "-1", "GET /c\nb99": "1",
        "\n20": "1", "\nabc": "1", "since": "nan", "nothing": "1", "GET \x1b[2J\ncount": "1", "GET /d\ncount": "x",
    }.items():  # fmt: skip
        valkey.hset(day, field, value)
    for each in ("null", "[" * 5000, '{"path": 1}', '{"timestamp": "now"}', "\xff", '"' + "x" * 9000):
        valkey.lpush(RECENT, each)

    counts, shared = traffic.read()

    assert shared
    assert set(counts.rows) <= {"GET /a", "GET /c"}
    assert counts.rows["GET /a"].count == 0
    assert set(counts.statuses) == {200}
    assert len(counts.recent) == 1


def test_r56_a_wrong_type_in_redis_is_as_if_there_were_no_redis(server: Valkey, valkey: redis.Redis) -> None:
    valkey.set(RECENT, "a text")
    traffic = Traffic(server.url)
    noted(traffic)

    counts, shared = traffic.read()

    assert (shared, counts.rows["GET /a"].count) == (False, 1)


def test_a_house_publishes_by_itself(
    tmp_path: Path, server: Valkey, valkey: redis.Redis, settings: Any
) -> None:
    from tests.support.inprocess import PEPPERS

    settings.PENSTOCK_PEPPERS = PEPPERS
    with House(tmp_path, redis_url=server.url) as house:
        ask(house)
        deadline = time.monotonic() + 20
        while not valkey.exists(RECENT):
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert Traffic(server.url).read()[0].rows["POST /v1/chat/completions"].errors == 1


def test_nothing_was_counted_yet() -> None:
    counts, shared = Traffic().read()

    assert (bool(counts), shared, counts.total()) == (False, False, Row())
    assert isinstance(counts, Counts)
