"""Three ledgers, what callers were told, what the provider saw and what the database says, after kills and on a full disk.

The seed of the kills is printed and may be given: PENSTOCK_CHAOS_SEED=7 kills the same things at the same moments again.
"""

from __future__ import annotations

import contextlib
import os
import random
import secrets
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from proxy.segments import SEGMENT_NAME
from tests.support import answers, soak
from tests.support.budgeted import books, give_budget
from tests.support.callers import Callers, asking
from tests.support.gateway import Gateway
from tests.support.processes import descendants
from tests.support.reconcile import reconcile
from tests.support.rows import usage_rows
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.timeout(300)

TOKENS = 10
"""Of each answer, a nano-dollar each."""
PLENTY = 10**9
CALLERS = 6
PAUSES = (0.2, 1.0)
"""Seconds between two kills, at random between these."""


def wait(condition: Callable[[], object], about: Callable[[], object], *, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, about()
        time.sleep(0.05)


@contextlib.contextmanager
def two_workers(upstream: Upstream, valkey: Valkey | None = None) -> Iterator[tuple[Gateway, str]]:
    """A gateway whose key has a budget and limits."""
    with Gateway(programs=["drainer"], env={"WEB_CONCURRENCY": "2"}, redis=valkey) as gateway:
        limits = {"requests_per_minute": 10**6, "max_concurrency": 1000}
        key = gateway.provide(f"{upstream.url}/v1", limits=limits)
        give_budget(gateway, key, PLENTY)
        yield gateway, key


def booked(gateway: Gateway) -> bool:
    """Whether nothing of any worker waits in the spool."""
    return not any(SEGMENT_NAME.fullmatch(name) for name in os.listdir(gateway.data_dir / "spool"))


def close_the_books(gateway: Gateway) -> None:
    """End the web workers; then everything is booked, and nothing is held for anybody."""
    gateway.process().stop(timeout=45)
    wait(lambda: booked(gateway), lambda: gateway.logs("drainer")[-3000:], seconds=30)


def assert_all_agree(gateway: Gateway, upstream: Upstream, callers: Callers) -> Counter[str]:
    """The ledgers, and the money: rows, account and the provider's own count of tokens. How the attempts ended."""
    rows = usage_rows(gateway)
    for told in callers.tolds:
        told.check()
    reconcile(callers.tolds, rows, {"upstream": upstream})
    spent, held, cost, _ = books(gateway)
    assert (spent, held) == (cost, 0)
    ended = {str(row["request_id"]): str(row["status"]) for row in rows}
    assert len(ended) == len(rows), "a call became two rows"
    told_by_provider = Counter[str]()
    for record in upstream.ledger.asked:
        told_by_provider[ended[record.json["messages"][0]["content"]]] += record.chunks_sent
    assert told_by_provider["success"] == spent, (told_by_provider, spent)
    return Counter(ended.values())


# -- kills -----------------------------------------------------------------------------------------------------------


class Killer:
    """Kills a web worker, the drainer or Valkey, as chance has it, and starts again what nobody else does."""

    def __init__(self, gateway: Gateway, valkey: Valkey, seed: int) -> None:
        self.killed = Counter[str]()
        self._gateway, self._valkey = gateway, valkey
        self._dice = random.Random(seed)

    def strike(self) -> None:
        time.sleep(self._dice.uniform(*PAUSES))
        victim = self._dice.choice(["worker", "worker", "drainer", "valkey"])
        self.killed[victim] += 1
        if victim == "worker":
            workers = descendants(self._gateway.process().pid)
            os.kill(workers[self._dice.randrange(len(workers))], signal.SIGKILL)
        elif victim == "drainer":
            self._gateway.kill9("drainer")
            self._gateway.start("drainer")
        else:
            self._valkey.kill()
            time.sleep(self._dice.uniform(0, 0.5))
            self._valkey.start()


def assert_ledgers_agree_after_kills(kills: int) -> None:
    seed = int(os.environ.get("PENSTOCK_CHAOS_SEED") or secrets.randbelow(10**6))
    print(f"PENSTOCK_CHAOS_SEED={seed}")
    with (
        Upstream(answers.ok(chunks=TOKENS, delay=0.02)) as upstream,
        Valkey() as valkey,
        two_workers(upstream, valkey) as (gateway, key),
    ):
        killer = Killer(gateway, valkey, seed)
        with Callers(asking(gateway, key), count=CALLERS) as callers:
            for _ in range(kills):
                killer.strike()
        close_the_books(gateway)
        ended = assert_all_agree(gateway, upstream, callers)
        assert {told.code or told.status for told in callers.tolds if not told.left} == {200}
        assert "Traceback" not in gateway.logs()
        soak.say(
            kills=dict(killer.killed), calls=len(callers.heard), records=dict(ended), spent=books(gateway)[0]
        )
        assert killer.killed.total() == kills
        assert ended["success"] > CALLERS


def test_three_ledgers_agree_to_the_nano_dollar_after_ten_kills() -> None:
    assert_ledgers_agree_after_kills(10)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_three_ledgers_agree_to_the_nano_dollar_after_a_hundred_kills() -> None:
    assert_ledgers_agree_after_kills(100)


# -- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small_spool() -> Iterator[Callable[[Gateway], None]]:
    """Gives a gateway that does not run yet a disk of its own for its spool, of one megabyte."""
    mounted: list[str] = []

    def give(gateway: Gateway) -> None:
        folder = gateway.data_dir / "spool"
        folder.mkdir(mode=0o700, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(folder)]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small tmpfs is not allowed here")
        mounted.append(str(folder))

    yield give
    for folder in mounted:
        subprocess.run(["umount", "--lazy", folder], check=False)


@pytest.mark.no_database
def test_f26_on_a_full_disk_nobody_is_served_for_nothing_and_all_is_well_when_there_is_room(
    small_spool: Callable[[Gateway], None],
) -> None:
    with (
        Upstream(answers.ok(chunks=TOKENS)) as upstream,
        Gateway(programs=["drainer"], env={"WEB_CONCURRENCY": "2"}, start=False) as gateway,
    ):
        small_spool(gateway)
        key = gateway.provide(f"{upstream.url}/v1")
        gateway.start()
        give_budget(gateway, key, PLENTY)
        ballast = gateway.data_dir / "spool" / "ballast"
        ask = asking(gateway, key)
        with Callers(ask, count=CALLERS) as callers:
            wait(lambda: len(callers.heard) > 20, gateway.logs, seconds=20)
            # What the drainer empties makes room again, which is then filled, too.
            wait(lambda: _fill_up(ballast) and _refused(callers, last=50), gateway.logs, seconds=30)
            asked = len(upstream.ledger.asked)
            refused = ask("while-full")
            assert (refused.status, refused.code) == (503, "usage_log_unavailable")
            assert int(refused.headers["retry-after"]) >= 1
            with gateway.client() as client:
                ready = client.get("/readyz")
            assert (ready.status_code, ready.json()["status"]) == (200, "degraded")
            ballast.unlink()
            wait(lambda: len(upstream.ledger.asked) > asked + 50, gateway.logs, seconds=20)
        close_the_books(gateway)
        ended = assert_all_agree(gateway, upstream, callers)
        codes = Counter(told.code for told in callers.tolds)
        assert set(codes) == {"", "usage_log_unavailable"}
        assert ended == {"success": codes[""]}
        assert "corrupt" not in gateway.logs("drainer")


def _refused(callers: Callers, *, last: int) -> bool:
    return all(told.code == "usage_log_unavailable" for told in callers.tolds[-last:])


def _fill_up(ballast: Path) -> bool:
    """Write until there is no room for anything; always true."""
    with ballast.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(512))
    return True
