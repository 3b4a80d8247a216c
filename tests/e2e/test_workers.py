"""One worker of several dies, or has no memory left: the others, and the records, do not suffer."""

from __future__ import annotations

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.processes import descendants
from tests.support.rows import usage_rows
from tests.support.told import listen
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

STREAMS = 12
QUESTION = {"messages": [{"role": "user", "content": "hello"}]}


def test_f34_a_worker_that_is_killed_takes_nothing_of_its_siblings_with_it_and_is_replaced() -> None:
    slow = answers.ok(chunks=60, delay=0.05)
    with (
        Upstream(slow) as upstream,
        Gateway(programs=["drainer"], env={"WEB_CONCURRENCY": "2"}) as gateway,
        ThreadPoolExecutor(STREAMS) as pool,
    ):
        key = gateway.provide(f"{upstream.url}/v1")
        workers = descendants(gateway.process().pid)
        assert len(workers) == 2
        running = [pool.submit(listen, gateway.url, key, f"worker-{n}") for n in range(STREAMS)]
        upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == STREAMS)
        upstream.ledger.wait_for(lambda ledger: all(each.chunks_sent > 10 for each in ledger.asked))
        os.kill(workers[0], signal.SIGKILL)
        told = [each.result(timeout=30) for each in running]

        whole = [each for each in told if each.ended_well]
        assert all(each.text == answers.Answer(texts=answers.words(60)).text for each in whole)
        assert whole, "no stream was at the other worker"
        gateway.process().wait_until(lambda: len(descendants(gateway.process().pid)) == 2, timeout=10)
        assert _asked(gateway, key) == 200

        rows = _settled(gateway, STREAMS + 1)
        by_request = {row["request_id"]: row["status"] for row in rows}
        assert len(by_request) == len(rows) == STREAMS + 1
        assert all(by_request[each.name] == "success" for each in whole)
        assert all(by_request[each.name] == "interrupted" for each in told if not each.ended_well)


def test_metrics_are_those_of_all_workers_whoever_is_asked_and_of_those_that_died() -> None:
    with Upstream() as upstream, Gateway(env={"WEB_CONCURRENCY": "2"}) as gateway:
        key = gateway.provide(f"{upstream.url}/v1")
        for _ in range(12):
            assert _asked(gateway, key) == 200
        gateway.process().wait_until(lambda: _attempts(gateway) == {12.0}, timeout=10)
        os.kill(descendants(gateway.process().pid)[0], signal.SIGKILL)
        gateway.process().wait_until(lambda: len(descendants(gateway.process().pid)) == 2, timeout=10)
        assert _asked(gateway, key) == 200
        gateway.process().wait_until(lambda: _attempts(gateway) == {13.0}, timeout=10)


def _attempts(gateway: Gateway) -> set[float]:
    """As `/metrics` counts them a dozen times; each question goes to whichever worker takes it, and others tell theirs within a second."""
    return {_attempts_told(gateway) for _ in range(12)}


def _attempts_told(gateway: Gateway) -> float:
    text = httpx.get(f"{gateway.url}/metrics", timeout=10).text
    lines = [line for line in text.splitlines() if line.startswith("penstock_attempts_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_f45_without_memory_requests_are_refused_at_once_and_the_process_lives() -> None:
    limit = {"MEMORY_LIMIT_BYTES": str(32 * 1024 * 1024)}
    with Upstream() as upstream, Gateway(env=limit) as gateway:
        key = gateway.provide(f"{upstream.url}/v1")
        deadline = time.monotonic() + 5
        while _asked(gateway, key) != 503:
            assert time.monotonic() < deadline
        with gateway.client(key) as client:
            began = time.monotonic()
            refused = client.post("/v1/chat/completions", json=QUESTION)
            assert time.monotonic() - began < 3
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
            assert int(refused.headers["retry-after"]) >= 1
            assert client.get("/livez").status_code == 200


def _asked(gateway: Gateway, key: str) -> int:
    return httpx.post(
        f"{gateway.url}/v1/chat/completions",
        json=QUESTION,
        headers={"Authorization": f"Bearer {key}"},
        timeout=30,
    ).status_code


def _settled(gateway: Gateway, count: int) -> list[dict[str, str]]:
    deadline = time.monotonic() + 30
    while True:
        rows = usage_rows(gateway)
        if len(rows) >= count:
            return rows
        assert time.monotonic() < deadline, rows
        time.sleep(0.2)
