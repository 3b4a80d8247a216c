"""Two replicas on one database, each restarted once under load: no caller notices, and no record is lost."""

from __future__ import annotations

import asyncio
import itertools
import json
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import aiohttp
import pytest

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.reconcile import reconcile
from tests.support.rows import settled_usage_rows
from tests.support.told import CHAT, Told, question
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.timeout(180), pytest.mark.no_database]

RATE = 50
MOST_SECONDS = 60
CHUNKS = 30
SHARED = ("PENSTOCK_ENCRYPTION_KEY", "PENSTOCK_PEPPERS", "SECRET_KEY", "JWT_SIGNING_KEY", "DATABASE_URL")


@contextmanager
def replicas(upstream: Upstream) -> Iterator[tuple[list[Gateway], str]]:
    """Two installations with one database and one set of secrets, each with a spool and a drainer of its own; a key."""
    with Gateway(programs=["drainer"], start=False) as first:
        first.env.setdefault("DATABASE_URL", f"sqlite:///{first.data_dir / 'penstock.sqlite3'}")
        key = first.provide(f"{upstream.url}/v1", slug="first")
        shared = {name: first.env[name] for name in SHARED if name in first.env}
        with Gateway(programs=["drainer"], start=False, env=shared) as second:
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(Gateway.start, (first, second)))
            for each in (first, second):
                each.wait_for_key(key)
            yield [first, second], key


class Balancer:
    """A client as behind a load balancer: each request on a connection of its own to a replica whose readiness is good.

    A connection that is refused before a byte went out is tried once on the other replica; nothing else is tried twice.
    """

    def __init__(self, gateways: list[Gateway], key: str) -> None:
        self.tolds: list[Told] = []
        self.failures: list[str] = []
        self.ready = [True] * len(gateways)
        self.stop = threading.Event()
        self._gateways = gateways
        self._headers = {"Authorization": f"Bearer {key}"}
        self._turn = itertools.count()

    async def run(self) -> None:
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(
            headers=self._headers, connector=connector, timeout=timeout
        ) as session:
            looks = [
                asyncio.create_task(self._look(session, number)) for number in range(len(self._gateways))
            ]
            running: list[asyncio.Task[None]] = []
            began = time.monotonic()
            while not self.stop.is_set() and len(running) < RATE * MOST_SECONDS:
                running.append(asyncio.create_task(self._one(session, f"rolling-{len(running)}")))
                await asyncio.sleep(max(0.0, began + len(running) / RATE - time.monotonic()))
            await asyncio.gather(*running)
            for look in looks:
                look.cancel()

    async def _look(self, session: aiohttp.ClientSession, number: int) -> None:
        """Readiness, five times a second."""
        while True:
            try:
                async with session.get(
                    f"{self._gateways[number].url}/readyz", timeout=aiohttp.ClientTimeout(total=2)
                ) as response:
                    self.ready[number] = response.status == 200
            except (aiohttp.ClientError, TimeoutError):
                self.ready[number] = False
            await asyncio.sleep(0.2)

    async def _one(self, session: aiohttp.ClientSession, name: str) -> None:
        turn = next(self._turn)
        order = sorted(
            range(len(self._gateways)), key=lambda number: (not self.ready[number], (number + turn) % 2)
        )
        try:
            try:
                told = await self._ask(session, order[0], name, turn)
            except aiohttp.ClientConnectorError:
                told = await self._ask(session, order[1], name, turn)
        except (aiohttp.ClientError, TimeoutError) as error:
            self.failures.append(f"{name} on {order}, ready {self.ready}: {error!r}")
        else:
            self.tolds.append(told)

    async def _ask(self, session: aiohttp.ClientSession, number: int, name: str, turn: int) -> Told:
        body = question(name, stream=turn % 2 == 0)
        url = f"{self._gateways[number].url}{CHAT}"
        async with session.post(url, json=body, headers={"x-request-id": name}) as response:
            told = Told(
                name, response.status, {key.lower(): value for key, value in response.headers.items()}
            )
            told.body = await response.read()
            return told


def test_a_rolling_restart_of_two_replicas_fails_no_request_and_loses_no_record() -> None:
    with (
        Upstream(answers.ok(chunks=CHUNKS, delay=0.02)) as upstream,
        replicas(upstream) as (gateways, key),
        ThreadPoolExecutor(1) as pool,
    ):
        balancer = Balancer(gateways, key)
        load = pool.submit(asyncio.run, balancer.run())
        try:
            for number, gateway in enumerate(gateways):
                time.sleep(3)
                gateway.process().send_signal(signal.SIGTERM)
                assert gateway.process().wait(45) == 0
                gateway.start("web")
                _wait_until_used(balancer, number)
            time.sleep(2)
        finally:
            balancer.stop.set()
            load.result(60)

        assert not balancer.failures
        assert len(balancer.tolds) > 10 * RATE
        whole = "".join(answers.words(CHUNKS))
        for told in balancer.tolds:
            told.check(whole_text=whole)
            assert told.status == 200 and told.text == whole, (told.name, told.status, told.body)
        rows = settled_usage_rows(gateways[0])
        reconcile(balancer.tolds, rows, {"first": upstream})
        assert len(rows) == len(balancer.tolds)
        assert all("Traceback" not in gateway.logs() for gateway in gateways)


def _wait_until_used(balancer: Balancer, number: int, seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not balancer.ready[number]:
        assert time.monotonic() < deadline, json.dumps(balancer.ready)
        time.sleep(0.05)
