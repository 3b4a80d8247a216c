"""Too many readers that do not read, too few file descriptors, a database that hangs: what the web process makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import statistics
import time
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from tests.security.conftest import rss
from tests.support import answers
from tests.support.answers import Answer
from tests.support.gateway import Gateway
from tests.support.ports import LOOPBACK
from tests.support.postgres import Postgres
from tests.support.stalled import endless, stalled_reader
from tests.support.told import CHAT, listen, question
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.timeout(240), pytest.mark.no_database]

MIB = 1024 * 1024
TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def held(upstream: Upstream) -> Iterator[tuple[Gateway, str]]:
    with Gateway(programs=["drainer"]) as gateway:
        yield gateway, gateway.provide(f"{upstream.url}/v1", slug="first")


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processor, in user and system mode."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


# -- F16 -----------------------------------------------------------------------------------------------------------------


def stalled_readers(gateway: Gateway, key: str, upstream: Upstream, count: int) -> float:
    """By how many million bytes the web process grows under so many readers of 100 MiB that read nothing."""
    pid = gateway.process().pid
    listen(gateway.url, key, "warm").check()
    upstream.ledger.clear()
    upstream.behave(endless())
    before = rss(pid)
    with contextlib.ExitStack() as wires:
        for number in range(count):
            wires.callback(stalled_reader(gateway.port, key, f"stalled-{count}-{number}").close)
        upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == count, timeout=60)
        _wait_until_still(upstream)
        growth = rss(pid) - before
        upstream.script(answers.ok())
        told = listen(gateway.url, key, f"beside-{count}")
        told.check(whole_text=Answer().text)
        assert told.ended_well and told.took < 6
    upstream.ledger.wait_for(
        lambda ledger: all(each.done for each in ledger.asked), timeout=30
    )  # who left is noticed, and the provider is stopped
    upstream.reset()
    return growth


def _wait_until_still(upstream: Upstream, quiet: float = 0.5, seconds: float = 60) -> None:
    """Until the upstream can send no more: everything between it and the readers is full."""
    deadline, since = time.monotonic() + seconds, time.monotonic()
    before = -1
    while time.monotonic() - since < quiet:
        assert time.monotonic() < deadline, "the upstream is read from for ever"
        if (now := sum(record.bytes_sent for record in upstream.ledger.asked)) != before:
            before, since = now, time.monotonic()
        time.sleep(0.05)


def test_f16_a_hundred_readers_that_read_nothing_cost_little_memory(
    held: tuple[Gateway, str], upstream: Upstream
) -> None:
    """A thousand of them may cost 300 MB (the soak), so these may cost 30, and 10 for what grows only once."""
    gateway, key = held
    assert stalled_readers(gateway, key, upstream, 100) < 40


@pytest.mark.soak
def test_f16_a_thousand_readers_that_read_nothing_cost_less_than_300_megabytes(
    held: tuple[Gateway, str], upstream: Upstream
) -> None:
    gateway, key = held
    assert stalled_readers(gateway, key, upstream, 1000) < 300


# -- F44 -----------------------------------------------------------------------------------------------------------------


def test_f44_without_descriptors_streams_go_on_nothing_spins_and_it_recovers(
    held: tuple[Gateway, str], upstream: Upstream
) -> None:
    gateway, key = held
    pid = gateway.process().pid
    upstream.behave(answers.ok(chunks=60, delay=0.1))
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    asyncio.run(_exhaust(gateway, key, upstream, pid, hard))
    upstream.reset()
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    assert "Traceback" not in gateway.logs("web")


async def _exhaust(gateway: Gateway, key: str, upstream: Upstream, pid: int, hard: int) -> None:
    headers = {"Authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream(number: int) -> bytes:
            body = question(f"lives-{number}", stream=True)
            async with session.post(f"{gateway.url}{CHAT}", json=body) as response:
                return await response.read()

        streams = [asyncio.create_task(stream(number)) for number in range(20)]
        await upstream.ledger.until(lambda ledger: len(ledger.asked) >= 20, timeout=20)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (256, hard))
        wires: list[socket.socket] = []
        try:
            for _ in range(400):
                wire = socket.socket()
                wire.setblocking(False)
                with contextlib.suppress(BlockingIOError, ConnectionError):
                    wire.connect((LOOPBACK, gateway.port))
                wires.append(wire)
            await asyncio.sleep(0.5)
            assert descriptors(pid) >= 250, "the descriptors are not used up"
            used, began = cpu_seconds(pid), time.monotonic()
            await asyncio.sleep(2)
            share = (cpu_seconds(pid) - used) / (time.monotonic() - began)
            assert share < 0.5, f"{share:.0%} of a processor while nothing can be accepted"
        finally:
            for wire in wires:
                wire.close()
        texts = await asyncio.gather(*streams)
    assert all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    upstream.behave(answers.ok())
    deadline = time.monotonic() + 10
    while True:
        with contextlib.suppress(OSError, ValueError):
            told = await asyncio.to_thread(listen, gateway.url, key, f"after-{time.monotonic()}", timeout=3)
            if told.ended_well:
                break
        assert time.monotonic() < deadline, "it does not recover"
        await asyncio.sleep(0.2)
    assert descriptors(pid) < 200


# -- F43 -----------------------------------------------------------------------------------------------------------------

STREAMS = 200


async def _lag(gateway: Gateway, key: str, upstream: Upstream, seconds: float = 3.0) -> list[float]:
    """How long /livez, which waits for nothing but the loop, takes to answer while 200 streams run."""
    headers = {"Authorization": f"Bearer {key}"}
    took: list[float] = []
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def stream(number: int) -> None:
            body = question(f"lag-{number}", stream=True)
            async with session.post(f"{gateway.url}{CHAT}", json=body) as response:
                assert (await response.read()).endswith(b"data: [DONE]\n\n")

        upstream.ledger.clear()
        running = [asyncio.create_task(stream(number)) for number in range(STREAMS)]
        await upstream.ledger.until(lambda ledger: len(ledger.asked) >= STREAMS, timeout=20)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            began = time.monotonic()
            async with session.get(f"{gateway.url}/livez") as response:
                assert response.status == 200
                await response.read()
            took.append(time.monotonic() - began)
            await asyncio.sleep(0.01)
        await asyncio.gather(*running)
    return took


@pytest.mark.alone
def test_f43_a_hanging_database_does_not_hold_up_the_loop_under_two_hundred_streams(
    upstream: Upstream,
) -> None:
    """The probe runs in a busy process of its own, so its own lateness, measured while all is well, is allowed for."""
    upstream.behave(answers.ok(chunks=10, delay=0.4))
    with Postgres() as postgres, Gateway(database=postgres) as gateway:
        key = gateway.provide(f"{upstream.url}/v1", slug="first")
        well = asyncio.run(_lag(gateway, key, upstream))
        postgres.pause()
        try:
            # The console's requests hang in threads meanwhile, which is where they belong.
            with contextlib.ExitStack() as hanging:
                for _ in range(20):
                    hanging.enter_context(contextlib.closing(_console_request(gateway)))
                frozen = asyncio.run(_lag(gateway, key, upstream))
        finally:
            postgres.resume()
    upstream.reset()
    assert percentile(frozen) < max(0.05, 1.5 * percentile(well)), (percentile(well), percentile(frozen))


def _console_request(gateway: Gateway) -> socket.socket:
    wire = socket.create_connection((LOOPBACK, gateway.port))
    wire.sendall(b"GET /admin/login/ HTTP/1.1\r\nHost: localhost\r\nCookie: sessionid=abcdefgh\r\n\r\n")
    return wire


def percentile(values: list[float]) -> Any:
    return statistics.quantiles(values, n=100)[98]
