"""R42: a budget for ten requests, hundreds at once, two workers; whatever happens to Redis, a worker or the database."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.support import answers
from tests.support.budgeted import books, give_budget, settled
from tests.support.gateway import Gateway
from tests.support.postgres import Postgres
from tests.support.processes import descendants
from tests.support.rows import query
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.timeout(300)

TOKENS = 5
"""Of each answer, a nano-dollar each; the prompt is free."""
BUDGET = 10 * TOKENS
BODY = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": TOKENS}


@contextmanager
def two_workers(
    upstream: Upstream, amount: int = BUDGET, *, redis: Valkey | None = None, database: Any = None
) -> Iterator[tuple[Gateway, str]]:
    with Gateway(
        programs=["drainer"], env={"WEB_CONCURRENCY": "2"}, redis=redis, database=database
    ) as gateway:
        key = gateway.provide(f"{upstream.url}/v1")
        give_budget(gateway, key, amount)
        yield gateway, key


async def ask_at_once(
    gateway: Gateway, key: str, count: int, *, name: str = "", meanwhile: Callable[[], None] | None = None
) -> Counter[tuple[int, str]]:
    """(status, code) of each of `count` requests that are sent together. name: their `x-request-id`, if they have one."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    headers = {"Authorization": f"Bearer {key}", **({"x-request-id": name} if name else {})}
    async with httpx.AsyncClient(base_url=gateway.url, headers=headers, limits=limits, timeout=60) as client:

        async def ask() -> tuple[int, str]:
            response = await client.post("/v1/chat/completions", json=BODY)
            return response.status_code, "" if response.is_success else response.json()["error"]["code"]

        asked = [asyncio.create_task(ask()) for _ in range(count)]
        if meanwhile is not None:
            await asyncio.to_thread(meanwhile)
        return Counter(await asyncio.gather(*asked))


def test_r42_of_two_hundred_at_once_over_two_workers_ten_reach_the_upstream() -> None:
    with Upstream(answers.ok(chunks=TOKENS)) as upstream, two_workers(upstream) as (gateway, key):
        told = asyncio.run(ask_at_once(gateway, key, 200))
        reached = len(upstream.ledger.asked)
        assert 0 < reached <= 10
        assert told == {(200, ""): reached, (402, "budget_exceeded"): 200 - reached}
        assert settled(gateway, reached) == (reached * TOKENS, 0)
        # What a worker still held for itself is there for all of them again.
        rest = 10 - reached
        assert asyncio.run(ask_at_once(gateway, key, 20))[200, ""] == rest
        assert settled(gateway, 10) == (BUDGET, 0)


def test_a_hundred_calls_of_one_name_are_a_hundred_rows_and_a_hundred_charges() -> None:
    name = "the-same-for-all"
    with (
        Upstream(answers.ok(chunks=TOKENS)) as upstream,
        two_workers(upstream, 100 * BUDGET) as (gateway, key),
    ):
        assert asyncio.run(ask_at_once(gateway, key, 100, name=name)) == {(200, ""): 100}
        assert len(upstream.ledger.asked) == 100
        deadline = time.monotonic() + 30
        while books(gateway)[3] < 100:
            assert time.monotonic() < deadline, books(gateway)
            time.sleep(0.1)
        spent, _, cost, _ = books(gateway)
        assert spent == cost == 100 * TOKENS
        ((ids, requests, cost),) = query(
            gateway,
            "SELECT COUNT(DISTINCT id), COUNT(*), MIN(cost_nanodollars) FROM proxy_usagerecord "
            f"WHERE request_id = '{name}'",
        )
        assert (ids, requests, cost) == (100, 100, TOKENS)


@pytest.mark.no_database
def test_f20_a_budget_does_not_know_whether_there_is_a_redis(valkey_of_its_own: Valkey) -> None:
    def trouble() -> None:
        valkey_of_its_own.kill()
        time.sleep(0.2)
        valkey_of_its_own.start()

    with (
        Upstream(answers.ok(chunks=TOKENS, first_after=0.2)) as upstream,
        two_workers(upstream, 2 * BUDGET, redis=valkey_of_its_own) as (gateway, key),
    ):
        told = asyncio.run(ask_at_once(gateway, key, 100, meanwhile=trouble))
        valkey_of_its_own.restart()
        told += asyncio.run(ask_at_once(gateway, key, 100))
        assert set(told) == {(200, ""), (402, "budget_exceeded")}
        reached = len(upstream.ledger.asked)
        assert 0 < reached <= 20
        assert settled(gateway, reached) == (reached * TOKENS, 0)


def test_what_a_killed_worker_held_goes_back_when_its_spool_is_drained() -> None:
    slow = answers.ok(chunks=TOKENS, first_after=30)
    with Upstream() as upstream, two_workers(upstream, 100 * BUDGET) as (gateway, key):
        assert asyncio.run(ask_at_once(gateway, key, 12))[200, ""] == 12
        upstream.behave(slow)
        ended = asyncio.run(_killed_half_way(gateway, key, upstream))
        assert ended == 8
        spent, held = settled(gateway, 20)
        assert (spent, held) == (12 * TOKENS, 0)
        statuses = Counter(row[0] for row in query(gateway, "SELECT status FROM proxy_usagerecord"))
        assert statuses["interrupted"] == 8


async def _killed_half_way(gateway: Gateway, key: str, upstream: Upstream) -> int:
    """How many of eight requests ended without an answer when both workers were killed while they ran."""
    before = len(upstream.ledger.asked)
    async with httpx.AsyncClient(
        base_url=gateway.url, headers={"Authorization": f"Bearer {key}"}, timeout=60
    ) as client:
        running = [asyncio.create_task(client.post("/v1/chat/completions", json=BODY)) for _ in range(8)]
        await upstream.ledger.until(lambda ledger: len(ledger.asked) == before + 8)
        assert books(gateway)[1] > 0
        for worker in descendants(gateway.process().pid):
            os.kill(worker, signal.SIGKILL)
        return sum(
            isinstance(each, Exception) for each in await asyncio.gather(*running, return_exceptions=True)
        )


@pytest.mark.no_database
def test_f22_without_a_database_the_grant_is_spent_and_then_nothing_is_sent() -> None:
    with (
        Upstream(answers.ok(chunks=TOKENS)) as upstream,
        Postgres() as server,
        two_workers(upstream, 64 * BUDGET, database=server) as (gateway, key),
    ):
        assert asyncio.run(ask_at_once(gateway, key, 40))[200, ""] == 40
        held = books(gateway)[1]
        assert held > 0
        reached = len(upstream.ledger.asked)
        server.stop()
        told = asyncio.run(ask_at_once(gateway, key, 60))
        assert set(told) <= {(200, ""), (503, "budget_unavailable")}
        assert told[503, "budget_unavailable"] > 0
        assert (len(upstream.ledger.asked) - reached) * TOKENS <= held
        answer = httpx.post(
            f"{gateway.url}/v1/chat/completions", content=json.dumps({**BODY, "max_tokens": 10_000}),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )  # fmt: skip
        assert answer.status_code == 503 and int(answer.headers["retry-after"]) >= 1


@pytest.fixture
def valkey_of_its_own() -> Iterator[Valkey]:
    with Valkey() as server:
        yield server
