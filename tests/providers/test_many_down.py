"""Hundreds of providers that are all down, and several of every program: the probes stay few, spread and quiet (F31)."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import re
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import httpx
import pytest

from providers import tasks
from providers.health import JITTER
from tests.support import soak
from tests.support.gateway import PROGRAMS, Gateway
from tests.support.processes import REPOSITORY, Process
from tests.support.upstream import LoopThread, Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

HELLO = {"model": "well/tiny", "messages": [{"role": "user", "content": "hello"}]}
LATE = 1.5
"""Seconds that may pass between a claim and the question that it is for, on a machine that has much to do."""

ADD = """
from audit.changes import changes
from providers.models import Provider

with changes(actor=None, via="command"):
    for n in range({count}):
        host = f"127.{{1 + n // 200}}.{{1 + n % 200}}.1"
        provider = Provider(slug=f"down-{{n}}", name=f"down {{n}}", kind="vllm", base_url=f"http://{{host}}:{port}")
        provider.full_clean()
        provider.save()
"""


class Down:
    """As many hosts as there are addresses of loopback, all of which say 503 after a tenth of a second."""

    def __init__(self) -> None:
        self.asked: defaultdict[str, list[float]] = defaultdict(list)
        self.busy = self.most = 0
        self._thread = LoopThread("down")
        self._server = self._thread.run(asyncio.start_server(self._answer, "0.0.0.0", 0, backlog=1000))
        self.port: int = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> Down:
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.close()
        self._thread.stop()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        began = time.monotonic()
        self.busy += 1
        self.most = max(self.most, self.busy)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await reader.readuntil(b"\r\n\r\n")
                self.asked[writer.get_extra_info("sockname")[0]].append(began)
                await asyncio.sleep(0.1)
                self.busy -= 1
                writer.write(b"HTTP/1.1 503 Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                await writer.drain()
        finally:
            writer.close()  # Also where the test ends first.


def more_of(gateway: Gateway, *, beats: int, workers: int) -> Iterator[Process]:
    """Further replicas of the same installation."""
    for n in range(beats):
        words = [*PROGRAMS["beat"], "--schedule", str(gateway.folder / f"beat-{n}")]
        yield Process(words, name=f"beat {n}", env=gateway.env, cwd=REPOSITORY)
    for n in range(workers):
        words = [*PROGRAMS["worker"], f"--hostname=more-{n}@%h"]
        yield Process(words, name=f"worker {n}", env=gateway.env, cwd=REPOSITORY)


def ask_until(done: Callable[[float], bool], client: httpx.Client) -> list[float]:
    """What each request took, one after another until `done` says so of the seconds that passed; all of them are answered."""
    took = []
    start = time.monotonic()
    while not done(time.monotonic() - start):
        began = time.monotonic()
        client.post("/v1/chat/completions", json=HELLO).raise_for_status()
        took.append(time.monotonic() - began)
        time.sleep(0.05)
    return took


def assert_calm(*, providers: int, beats: int, workers: int, interval: float, seconds: float) -> None:
    """One beat and one worker, and these beside them, for so long at least, and until every provider was asked four times."""
    quick = {"HEALTH_CHECK_INTERVAL_SECONDS": str(interval)}
    with (
        Down() as down,
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(programs=("worker", "beat"), redis=valkey, env=quick, start=False) as gateway,
        ExitStack() as stack,
    ):
        key = gateway.provide(f"{upstream.url}/v1", slug="well")
        gateway.shell(ADD.format(count=providers, port=down.port))
        gateway.start("web")
        client = stack.enter_context(gateway.client(key))
        ask_until(lambda passed: passed > 1, client)  # the first ones find nothing warm
        usual = ask_until(lambda passed: passed > 3, client)
        gateway.start()
        more = [stack.enter_context(each) for each in more_of(gateway, beats=beats, workers=workers)]

        def enough(passed: float) -> bool:
            # Before the fourth question the third answer was noted, and with it the way from unknown to down.
            rounds = min(map(len, list(down.asked.values()))) if len(down.asked) == providers else 0
            assert passed < seconds + 8 * interval, (rounds, gateway.logs()[-3000:])
            return passed >= seconds and rounds >= 4

        took = ask_until(enough, client)
        logs = gateway.logs() + "".join(each.logs() for each in more)
        asked = {host: list(times) for host, times in down.asked.items()}

    assert 2 <= down.most <= tasks.MAX_AT_ONCE
    gaps = [later - earlier for times in asked.values() for earlier, later in itertools.pairwise(times)]
    # However many replicas there are, nobody is asked more often than one of them alone would ask.
    assert min(gaps) > interval * (1 - JITTER) - LATE, min(gaps)
    assert statistics.stdev(gaps) > interval * JITTER / 6
    told = Counter(re.findall(r"provider (down-\d+ was \w+ and is \w+)", logs))
    assert set(told.values()) == {1}
    assert len(told) == 2 * providers, "each goes from unknown to degraded, and then to down"
    assert "Traceback" not in logs
    soak.say(
        providers=providers,
        beats_and_workers=f"{1 + beats} and {1 + workers}",
        probes=sum(map(len, asked.values())),
        at_once=down.most,
        gaps=f"{min(gaps):.1f} to {max(gaps):.1f} s at an interval of {interval:g} s",
        lines=sum(told.values()),
        p99=f"{soak.percentile(usual, 0.99) * 1000:.0f} ms before and {soak.percentile(took, 0.99) * 1000:.0f} ms meanwhile",
    )


@pytest.mark.alone
@pytest.mark.timeout(200)
def test_f31_forty_providers_that_are_down_are_asked_as_if_there_were_one_worker() -> None:
    assert_calm(providers=40, beats=1, workers=1, interval=3, seconds=0)


@pytest.mark.soak
@pytest.mark.timeout(soak.SECONDS * 3 + 300)
def test_f31_five_hundred_providers_that_are_down_are_asked_as_if_there_were_one_worker() -> None:
    assert_calm(providers=500, beats=2, workers=3, interval=soak.SECONDS / 5, seconds=soak.SECONDS)
