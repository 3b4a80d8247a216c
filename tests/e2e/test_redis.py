"""F19 to F21 on the whole product: two workers under load, and a Redis that hangs, forgets, is restarted, full or a replica."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import httpx
import pytest
import redis

from tests.support import answers, soak
from tests.support.budgeted import books, give_budget
from tests.support.callers import Callers, asking
from tests.support.gateway import Gateway
from tests.support.told import CHAT
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = [pytest.mark.no_database, pytest.mark.timeout(400)]

TOKENS = 5
"""Of each answer, a nano-dollar each."""
PLENTY = 10**6
WORKERS = 2
CALLERS = 4
BEFORE_SECONDS = 2.5
HANGS_SECONDS = 1.5
DELAY_SECONDS = 0.06
ERRORS_PER_WORKER = 5
SHARED_AGAIN_SECONDS = 2.0
CONSUMES_AGAIN_SECONDS = 30.0
KEPT = {"temperature": 0, "messages": [{"role": "user", "content": "always the same"}]}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(answers.ok(chunks=TOKENS)) as running:
        yield running


class Running(NamedTuple):
    """starts_in: seconds that its programs need to start on this machine at this moment, more or less."""

    gateway: Gateway
    key: str
    starts_in: float


@pytest.fixture(scope="module")
def house(upstream: Upstream, valkey: Valkey) -> Iterator[Running]:
    """Everything that runs in production, with two web workers, and a key with limits, a budget and answers that are kept."""
    began = time.monotonic()
    env = {"WEB_CONCURRENCY": str(WORKERS), "HEALTH_CHECK_INTERVAL_SECONDS": "1"}
    with Gateway(redis=valkey, programs=["worker", "beat", "drainer"], env=env) as gateway:
        limits = {"requests_per_minute": PLENTY, "max_concurrency": 1000, "cache_seconds": 60}
        key = gateway.provide(f"{upstream.url}/v1", limits=limits)
        give_budget(gateway, key, PLENTY)
        wait(lambda: probes_of(upstream) > 0, gateway, seconds=60)
        yield Running(gateway, key, time.monotonic() - began)


@pytest.fixture
def store(valkey: Valkey) -> Iterator[Any]:
    with redis.Redis.from_url(valkey.url, socket_timeout=5) as client:
        yield client


def wait(condition: Callable[[], bool], gateway: Gateway, *, seconds: float) -> float:
    """Until the condition holds; how long that took. What ends meanwhile is started again, as the supervisor does."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, gateway.logs()[-6000:]
        for name in ("worker", "beat"):
            if not gateway.process(name).alive:
                gateway.start(name)
        time.sleep(0.05)
    return time.monotonic() - began


def readiness(gateway: Gateway) -> set[str]:
    """What the workers say of Redis; each answer comes on a connection of its own, so all of them are asked."""
    with httpx.Client(headers={"connection": "close"}) as client:
        told = [client.get(f"{gateway.url}/readyz") for _ in range(8 * WORKERS)]
    assert {each.status_code for each in told} == {200}
    assert all((each.json()["status"] == "ok") == (each.json()["details"]["redis"] == "ok") for each in told)
    return {each.json()["details"]["redis"] for each in told}


def counted(store: Any) -> tuple[int, int]:
    """(minute, requests in it) of the one key that has limits, as Redis counts them."""
    (name,) = store.keys("penstock:limit:*:r")
    minute, requests = store.hmget(name, "w", "c")
    return int(minute), int(requests)


def is_shared(gateway: Gateway, key: str, store: Any) -> bool:
    """Whether Redis counts each of some requests, whichever worker gets them, at once."""
    ask = asking(gateway, key, stream=False)
    ask("counted-0")  # so that there is a window
    for number in range(1, 6 * WORKERS):
        minute, before = counted(store)
        assert ask(f"counted-{number}").status == 200
        now, after = counted(store)
        if now == minute and after != before + 1:
            return False
    return True


@pytest.mark.alone
def test_f19_a_redis_that_hangs_under_load_delays_a_few_requests_and_fails_none(
    house: Running, valkey: Valkey, store: Any
) -> None:
    gateway, key, _ = house
    began = time.monotonic()
    wait(lambda: is_shared(gateway, key, store), gateway, seconds=30)
    looking = time.monotonic() - began
    with Callers(asking(gateway, key, stream=False), count=CALLERS, prefix="hang") as callers:
        time.sleep(BEFORE_SECONDS)
        stopped = time.monotonic()
        valkey.pause()
        try:
            time.sleep(HANGS_SECONDS)
            said = readiness(gateway)
        finally:
            valkey.resume()
            resumed = time.monotonic()
    began = resumed
    while not is_shared(gateway, key, store):
        began = time.monotonic()
        # Half a look more, since a machine that is busy now was so before.
        assert began - resumed < SHARED_AGAIN_SECONDS + looking / 2
    shared_after = began - resumed
    wait(lambda: readiness(gateway) == {"ok"}, gateway, seconds=5)

    assert said == {"away; limits are kept by each process"}
    assert {told.status for told in callers.tolds} == {200}
    before = [each.told.took for each in callers.heard if each.at + each.told.took < stopped]
    during = [each.told.took for each in sorted(callers.heard) if stopped <= each.at < resumed]
    # Whoever asks while others wait waits with them, so as many again as there are callers.
    later = during[WORKERS * ERRORS_PER_WORKER + CALLERS :]
    usual = statistics.median(before)
    soak.say(
        requests=f"{len(before)} before, {len(during)} while it hung",
        p99=f"{percentile_ms(before)} and {percentile_ms(during)} ms",
        median=f"{usual * 1000:.1f} and {statistics.median(later) * 1000:.1f} ms",
        delayed=sum(took > usual + 0.04 for took in during),
        shared_again_after=f"{shared_after:.1f} s",
    )
    assert soak.percentile(during, 0.99) <= soak.percentile(before, 0.99) + DELAY_SECONDS
    assert statistics.median(later) <= usual + DELAY_SECONDS / 4


def percentile_ms(took: list[float]) -> str:
    return f"{soak.percentile(took, 0.99) * 1000:.0f}"


def restart(valkey: Valkey, store: Any) -> None:
    valkey.restart()


def forget(valkey: Valkey, store: Any) -> None:
    store.flushall()


def fill(valkey: Valkey, store: Any) -> None:
    assert store.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
    store.config_set("maxmemory", 1)


def follow_a_dead_host(valkey: Valkey, store: Any) -> None:
    store.replicaof("127.0.0.1", "1")


def repair(store: Any) -> None:
    store.config_set("maxmemory", 0)
    store.replicaof("NO", "ONE")


def test_f20_f21_whatever_redis_does_no_request_fails_budgets_are_exact_and_work_goes_on(
    house: Running, upstream: Upstream, valkey: Valkey, store: Any
) -> None:
    gateway, key, starts_in = house
    for damage in (forget, restart, fill, follow_a_dead_host):
        with (
            Callers(asking(gateway, key), count=2, prefix=damage.__name__) as callers,
            gateway.client(key) as client,
        ):
            ask_again(client)
            wait(lambda: ask_again(client) == "hit", gateway, seconds=5)
            damage(valkey, store)
            first = ask_again(client)
            if damage in (fill, follow_a_dead_host):
                wait(lambda: "ok" not in readiness(gateway), gateway, seconds=10)
                assert ask_again(client) == "miss"
                repair(store)
            else:
                assert first == "miss"
            # On a replica Celery's worker ends, and whoever supervises it starts it again.
            consumes = consumes_again(gateway, upstream, seconds=CONSUMES_AGAIN_SECONDS + starts_in)
            wait(lambda: readiness(gateway) == {"ok"}, gateway, seconds=5)
            wait(lambda: ask_again(client) == "hit", gateway, seconds=5)
        soak.say(
            damage=damage.__name__, requests=len(callers.heard), consumes_again_after=f"{consumes:.1f} s"
        )
        assert {told.code or told.status for told in callers.tolds} == {200}
        wait(lambda: is_shared(gateway, key, store), gateway, seconds=10)
    asked = len(upstream.ledger.asked)
    wait(lambda: books(gateway)[0] == asked * TOKENS, gateway, seconds=20)
    spent, _, cost, _ = books(gateway)
    assert spent == cost == asked * TOKENS


def consumes_again(gateway: Gateway, upstream: Upstream, *, seconds: float) -> float:
    """Until the worker has probed the provider twice more; how long that took."""
    before = probes_of(upstream)
    return wait(lambda: probes_of(upstream) > before + 1, gateway, seconds=seconds)


def ask_again(client: httpx.Client) -> str:
    """The same question as always; whether its answer was kept."""
    response = client.post(CHAT, json=KEPT)
    assert response.status_code == 200, response.text
    return response.headers["x-penstock-cache"]


def probes_of(upstream: Upstream) -> int:
    """How often the worker, which does nothing else here, has probed the provider."""
    return sum(record.method == "GET" for record in upstream.ledger.records)
