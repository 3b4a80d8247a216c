"""Limits of keys, against a real Valkey and without one."""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from providers.wire import Quota
from proxy import limits_redis
from proxy.auth import Caller
from proxy.errors import ConcurrencyLimited, RateLimited
from proxy.limits import UNLIMITED, Held, Limits
from proxy.limits_local import SECOND, WINDOW, Reading, Window, duration
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database


class Clock:
    """Monotonic seconds that only pass when told to."""

    def __init__(self, now: float = 6000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def caller(
    key_id: str = "k",
    *,
    requests: int | None = None,
    tokens: int | None = None,
    running: int | None = None,
    owner: Quota | None = None,
) -> Caller:
    """A key; `owner` is what all keys of alice may do together."""
    return Caller(
        id=1, key_id=key_id, name="app", owner="alice", digest="", pepper=1, user_id=7, owner_quota=owner,
        requests_per_minute=requests, tokens_per_minute=tokens, max_concurrency=running,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server() -> Iterator[Valkey]:
    with Valkey() as valkey:
        yield valkey


@pytest.fixture
def valkey(server: Valkey) -> Iterator[Valkey]:
    """The module's server, empty, and healthy again afterwards."""
    with redis.Redis.from_url(server.url) as client:
        client.flushall()
        client.script_flush()
    yield server
    server.resume()
    with redis.Redis.from_url(server.url) as client:
        client.config_set("maxmemory", 0)
        client.replicaof("NO", "ONE")


@pytest.fixture
def client(valkey: Valkey) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(valkey.url, socket_timeout=5) as connection:
        yield connection


@pytest.fixture
async def make(valkey: Valkey) -> AsyncIterator[Callable[..., Limits]]:
    """Limits of one process after the other, all on the same Valkey."""
    made: list[Limits] = []

    def build(url: str = valkey.url, **options: Any) -> Limits:
        made.append(Limits(url, **options))
        return made[-1]

    yield build
    for limits in made:
        await limits.close()


async def take(limits: Limits, who: Caller, tokens: int = 1) -> Held:
    """A request that came and went."""
    async with limits.hold(who.scopes, member="r", tokens=tokens) as held:
        return held


async def refused(limits: Limits, who: Caller, tokens: int = 1) -> RateLimited:
    with pytest.raises(RateLimited) as caught:
        await take(limits, who, tokens)
    return caught.value


async def count_taken(awaitables: list[Awaitable[Held]]) -> int:
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    unexpected = [r for r in results if isinstance(r, BaseException) and not isinstance(r, RateLimited)]
    assert unexpected == []
    return sum(isinstance(result, Held) for result in results)


async def until(condition: Callable[[], object], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come true in time"
        await asyncio.sleep(0.005)


async def break_link(limits: Limits) -> None:
    """Five failing requests of another key open the breaker."""
    for _ in range(limits_redis.ERRORS_IN_A_ROW):
        await take(limits, caller("other", requests=1000))
    assert limits.local


def calls(client: redis.Redis) -> int:
    """Commands that Valkey ran for others than this test's own client."""
    stats = client.info("commandstats")
    mine = {"cmdstat_info", "cmdstat_config|resetstat", "cmdstat_hello", "cmdstat_client|setinfo"}
    return sum(value["calls"] for name, value in stats.items() if name not in mine)


async def age(client: redis.Redis, key: str, minutes: int = 1) -> None:
    """Make a window older by whole minutes, as Valkey's own clock cannot be moved."""
    client.hincrby(key, "w", -minutes)


@asynccontextmanager
async def far_from_the_minute(client: redis.Redis, seconds: float = 5) -> AsyncIterator[None]:
    """Run the block where Valkey's minute does not end for some seconds."""
    while (left := 60 - client.time()[0] % 60) <= seconds:
        await asyncio.sleep(min(0.5, left))
    yield


class Cutter:
    """Between us and Valkey. `cut`: what is written next is passed on, its reply is not, and the connection ends."""

    def __init__(self, server: Path, socket: Path) -> None:
        self._server, self._socket = server, socket
        self.cut = False

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        async with await asyncio.start_unix_server(self._serve, self._socket):
            yield

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, server = await asyncio.open_unix_connection(self._server)
        answers = asyncio.create_task(self._pass_on(replies, writer))
        while data := await reader.read(65536):
            if self.cut:
                answers.cancel()
            server.write(data)
            if self.cut:
                self.cut = False
                await asyncio.sleep(0.02)
                break
        answers.cancel()
        writer.close()
        server.close()

    @staticmethod
    async def _pass_on(replies: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await replies.read(65536):
            writer.write(data)


async def test_f19_tokens_are_not_given_back_twice_when_redis_hangs_up_before_it_answers(
    make: Any, valkey: Valkey, client: redis.Redis, tmp_path: Path
) -> None:
    cutter = Cutter(valkey.socket, tmp_path / "socket")
    async with cutter.listening(), far_from_the_minute(client):
        limits, who = make(f"unix://{tmp_path}/socket"), caller(tokens=100_000)
        async with limits.hold(who.scopes, member="long", tokens=5000):
            async with limits.hold(who.scopes, member="short", tokens=5000) as short:
                await asyncio.sleep(0.1)
                short.correct(10)
                cutter.cut = True
            await until(lambda: not cutter.cut)
            await asyncio.sleep(0.1)
            assert client.hget("penstock:limit:{k}:t", "c") == b"5010"


# Counting together


async def test_a_key_without_limits_costs_nothing_in_redis(make: Any, client: redis.Redis) -> None:
    limits = make()
    await take(limits, caller("limited", requests=10))
    client.config_resetstat()
    for _ in range(20):
        assert await take(limits, caller()) is UNLIMITED
    await limits.sweep()
    assert calls(client) == 0
    await take(limits, caller("limited", requests=10))
    assert calls(client) > 0


async def test_a_hold_is_one_command(make: Any, client: redis.Redis) -> None:
    limits = make()
    who = caller(requests=100, tokens=100_000, running=10)
    await take(limits, who)
    await limits.sweep()
    client.config_resetstat()
    async with limits.hold(who.scopes, member="r", tokens=10):
        stats = client.info("commandstats")
        assert stats["cmdstat_evalsha"]["calls"] == 1


async def test_200_at_once_over_two_processes_get_exactly_the_limit(make: Any, client: redis.Redis) -> None:
    one, two, who = make(workers=2), make(workers=2), caller(requests=50)
    async with far_from_the_minute(client):
        taken = await count_taken([take((one, two)[n % 2], who) for n in range(200)])
    assert taken == 50
    assert not one.local
    assert not two.local


async def test_200_at_once_over_two_processes_get_exactly_the_tokens(make: Any, client: redis.Redis) -> None:
    one, two, who = make(), make(), caller(tokens=1000)
    async with far_from_the_minute(client):
        taken = await count_taken([take((one, two)[n % 2], who, tokens=30) for n in range(200)])
    assert taken == 33


async def test_200_at_once_over_two_processes_get_exactly_the_places(make: Any, client: redis.Redis) -> None:
    one, two, who = make(), make(), caller(running=7)
    async with AsyncExitStack() as stack:
        taken = await count_taken(
            [
                stack.enter_async_context((one, two)[n % 2].hold(who.scopes, member="same", tokens=1))
                for n in range(200)
            ]
        )
        assert taken == 7
    await one.sweep()
    await two.sweep()
    assert client.zcard("penstock:limit:{k}:c") == 0


async def test_redis_may_be_on_a_port_and_in_a_numbered_database(make: Any) -> None:
    with Valkey(tcp=True) as own, redis.Redis.from_url(own.database(3)) as its:
        limits = make(own.database(3))
        await take(limits, caller(requests=5))
        assert its.exists("penstock:limit:{k}:r")
        assert not limits.local


async def test_a_refused_request_is_not_counted(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(requests=5, tokens=100, running=1)
    async with far_from_the_minute(client):
        await refused(limits, who, tokens=101)
        held = await take(limits, who, tokens=100)
    assert dict(held.headers)[b"x-ratelimit-remaining-requests"] == b"4"
    assert dict(held.headers)[b"x-ratelimit-remaining-tokens"] == b"0"


async def test_the_window_slides(make: Any, client: redis.Redis) -> None:
    limits, who, key = make(), caller(requests=60), "penstock:limit:{k}:r"
    async with far_from_the_minute(client):
        assert await count_taken([take(limits, who) for _ in range(60)]) == 60
        await age(client, key)
        seconds = client.time()[0] % 60
        assert client.hgetall(key)[b"c"] == b"60"
        taken = await count_taken([take(limits, who) for _ in range(61)])
        assert seconds <= taken <= seconds + 5
        await age(client, key, 2)
        assert await count_taken([take(limits, who) for _ in range(61)]) == 60


async def test_the_keys_expire(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(requests=5, tokens=500, running=5)
    async with limits.hold(who.scopes, member="r", tokens=1):
        for what, most in (("r", 120), ("t", 120), ("c", 31)):
            assert 0 < client.ttl(f"penstock:limit:{{k}}:{what}") <= most


async def test_what_the_caller_is_told_are_the_headers_of_openai(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(requests=2, tokens=1000)
    async with far_from_the_minute(client):
        first = dict((await take(limits, who, tokens=400)).headers)
        await take(limits, who, tokens=400)
        second = client.time()[0] % 60
        error = await refused(limits, who, tokens=1)
    assert first[b"x-ratelimit-limit-requests"] == b"2"
    assert first[b"x-ratelimit-remaining-requests"] == b"1"
    assert first[b"x-ratelimit-limit-tokens"] == b"1000"
    assert first[b"x-ratelimit-remaining-tokens"] == b"600"
    assert first[b"x-ratelimit-reset-tokens"].endswith(b"s")
    told = dict(error.headers)
    assert told[b"x-ratelimit-remaining-requests"] == b"0"
    assert set(told) == set(first)
    # This minute is full. It must end, and half of it must fade, before one more request fits.
    assert error.retry_after is not None
    assert abs(error.retry_after - (60 - second + 30)) <= 1
    assert error.code == "rate_limit_exceeded"


async def test_only_limits_that_are_set_have_headers(make: Any) -> None:
    held = await take(make(), caller(running=1))
    assert held.headers == ()
    assert UNLIMITED.headers == ()


async def test_a_correction_counts_the_true_total(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(tokens=1000)
    async with far_from_the_minute(client):
        async with limits.hold(who.scopes, member="r", tokens=100) as held:
            held.correct(700)
            held.correct(600)
        await limits.sweep()
        assert client.hget("penstock:limit:{k}:t", "c") == b"600"
        await refused(limits, who, tokens=401)
        held = await take(limits, who, tokens=400)
        held.correct(0)
        await take(limits, who, tokens=400)


async def test_what_was_estimated_too_high_goes_back_to_its_own_minute(
    make: Any, client: redis.Redis
) -> None:
    limits, who, key = make(), caller(tokens=10_000), "penstock:limit:{k}:t"
    async with far_from_the_minute(client):
        async with limits.hold(who.scopes, member="r", tokens=5000) as held:
            await age(client, key)
            held.remote_minute -= 1  # the clock of Valkey cannot be moved
            await take(limits, who, tokens=700)
            held.correct(1000)
        await limits.sweep()
        assert client.hmget(key, "c", "p") == [b"700", b"1000"]


async def test_a_total_beyond_all_measure_is_counted_as_a_large_one(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(tokens=1000)
    async with far_from_the_minute(client):
        for _ in range(2):
            held = await take(limits, who)
            held.correct(10**40)
            await refused(limits, who)
            client.delete("penstock:limit:{k}:t")
    assert not limits.local


async def test_a_request_that_ends_tells_redis_everything_in_one_command(
    make: Any, client: redis.Redis
) -> None:
    limits, alice = make(), Quota(tokens=10_000, running=10)
    who = caller(requests=100, tokens=100_000, running=10, owner=alice)
    async with limits.hold(who.scopes, member="r", tokens=10) as held:
        await limits.sweep()
        client.config_resetstat()
        held.correct(700)
    await until(lambda: client.zcard("penstock:limit:{k}:c") == 0)
    stats = client.info("commandstats")
    assert stats["cmdstat_evalsha"]["calls"] == 1
    for name in ("k", "user:7"):
        assert client.hget(f"penstock:limit:{{{name}}}:t", "c") == b"700"
        assert client.zcard(f"penstock:limit:{{{name}}}:c") == 0


# An owner's limits beside the key's


async def test_the_keys_of_one_owner_share_his_limit_in_one_command(make: Any, client: redis.Redis) -> None:
    one, two, alice = make(), make(), Quota(requests=50)
    keys = [caller(f"k{n}", requests=30, owner=alice) for n in range(3)]
    async with far_from_the_minute(client):
        taken = await count_taken([take((one, two)[n % 2], keys[n % 3]) for n in range(200)])
        assert taken == 50
        await one.sweep()
        client.config_resetstat()
        await refused(one, keys[0])
        assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == 1


async def test_what_the_owner_refuses_is_not_counted_for_the_key_and_the_other_way_round(
    make: Any, client: redis.Redis
) -> None:
    limits, alice = make(), Quota(requests=3, tokens=1000, running=5)
    async with far_from_the_minute(client):
        for _ in range(3):
            await take(limits, caller("busy", requests=10, owner=alice), tokens=100)
        error = await refused(limits, caller("idle", requests=10, tokens=1000, owner=alice))
        assert error.text == "The user alice has reached its limit of 3 requests per minute."
        assert not client.exists("penstock:limit:{idle}:r")
        client.delete("penstock:limit:{user:7}:r")
        error = await refused(limits, caller("idle", tokens=50, owner=alice), tokens=51)
        assert (
            error.text == "This request alone is larger than the limit of 50 tokens per minute of this key."
        )
        assert client.hget("penstock:limit:{user:7}:t", "c") == b"300"


async def test_the_places_of_an_owner_are_those_of_all_his_keys(make: Any, client: redis.Redis) -> None:
    one, two, alice = make(), make(), Quota(running=2)
    first, second = caller("k1", running=5, owner=alice), caller("k2", owner=alice)
    async with one.hold(first.scopes, member="r", tokens=1), two.hold(second.scopes, member="r", tokens=1):
        with pytest.raises(ConcurrencyLimited, match="The user alice has reached its limit of 2 requests at"):
            await take(one, first)
        assert client.zcard("penstock:limit:{k1}:c") == 1
        client.flushall()
        await one.sweep()
        await two.sweep()
        assert client.zcard("penstock:limit:{user:7}:c") == 2
    await until(lambda: client.zcard("penstock:limit:{user:7}:c") == 0)


@pytest.mark.parametrize("redis_url", [None, ""])
async def test_the_caller_is_told_of_the_scope_that_leaves_the_least(
    make: Any, client: redis.Redis, redis_url: str | None
) -> None:
    limits = make() if redis_url is None else make(redis_url)
    who = caller(requests=100, tokens=1000, owner=Quota(requests=10, tokens=100_000))
    async with far_from_the_minute(client):
        told = dict((await take(limits, who, tokens=400)).headers)
        assert (told[b"x-ratelimit-limit-requests"], told[b"x-ratelimit-remaining-requests"]) == (b"10", b"9")
        assert (told[b"x-ratelimit-limit-tokens"], told[b"x-ratelimit-remaining-tokens"]) == (b"1000", b"600")
        await take(limits, caller("other", owner=Quota(tokens=100_000)), tokens=99_500)
        told = dict((await take(limits, who, tokens=1)).headers)
        assert (told[b"x-ratelimit-limit-tokens"], told[b"x-ratelimit-remaining-tokens"]) == (
            b"100000",
            b"99",
        )


async def test_retry_after_waits_for_the_slowest_of_all_windows() -> None:
    clock = Clock(6010)
    limits, alice = Limits("", clock=clock), Quota(requests=4)
    who = caller(requests=2, tokens=100, owner=alice)
    await take(limits, who, tokens=50)
    await take(limits, caller("other", owner=alice))
    clock.now += 25
    await take(limits, caller("other", owner=alice))
    await take(limits, who, tokens=50)
    error = await refused(limits, who, tokens=100)
    assert error.retry_after is not None
    assert "100 tokens per minute" in error.text  # all 100 must fade; half of the others' would do
    clock.now += error.retry_after - 1
    await refused(limits, who, tokens=100)
    clock.now += 1
    await take(limits, who, tokens=100)


async def test_without_redis_an_owner_has_his_share_in_each_process_too() -> None:
    limits, alice = Limits("", workers=4), Quota(requests=20, running=8)
    first, second = caller(owner=alice), caller("k2", owner=alice)
    async with (
        limits.hold(first.scopes, member="r", tokens=1),
        limits.hold(second.scopes, member="r", tokens=1),
    ):
        await refused(limits, caller("k3", owner=alice))
    assert await count_taken([take(limits, caller(f"k{n % 3}", owner=alice)) for n in range(20)]) == 3


async def test_f19_redis_that_comes_back_learns_what_owners_did(
    make: Any, valkey: Valkey, client: redis.Redis
) -> None:
    clock = Clock()
    limits, who = make(clock=clock), caller(owner=Quota(requests=100, tokens=10_000))
    async with far_from_the_minute(client):
        valkey.pause()
        await break_link(limits)
        held = await take(limits, who, tokens=50)
        held.correct(150)
        valkey.resume()
        clock.now += limits_redis.REST_SECONDS
        await limits.sweep()
        assert client.hget("penstock:limit:{user:7}:r", "c") == b"1"
        assert client.hget("penstock:limit:{user:7}:t", "c") == b"150"


# Places among the running ones


async def test_a_place_is_free_again_when_the_request_ends(make: Any) -> None:
    limits, who = make(), caller(running=1)
    for _ in range(20):
        async with limits.hold(who.scopes, member="r", tokens=1):
            with pytest.raises(ConcurrencyLimited) as caught:
                await take(limits, who)
            assert caught.value.retry_after == 1
            assert caught.value.code == "concurrency_limit_exceeded"


async def test_a_place_is_soon_free_for_the_other_process_without_a_sweep(
    make: Any, client: redis.Redis
) -> None:
    await take(make(), caller(running=1))
    await until(lambda: client.zcard("penstock:limit:{k}:c") == 0)
    await take(make(), caller(running=1))


async def test_a_place_is_free_again_when_the_request_is_cancelled(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(running=1)

    async def work() -> None:
        async with limits.hold(who.scopes, member="r", tokens=1):
            await asyncio.sleep(60)

    task = asyncio.create_task(work())
    await until(lambda: client.zcard("penstock:limit:{k}:c") == 1)
    task.cancel()
    await asyncio.wait({task})
    await take(limits, who)


async def test_cancelling_while_redis_is_asked_loses_no_place(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(running=3)
    for turns in range(12):
        task = asyncio.create_task(take(limits, who))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
    await limits.sweep()
    assert client.zcard("penstock:limit:{k}:c") == 0
    assert not limits.local


async def test_the_places_of_a_dead_process_are_freed_by_their_lease(make: Any, client: redis.Redis) -> None:
    dead, alive, who = make(lease_seconds=0.4), make(lease_seconds=0.4), caller(running=2)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(dead.hold(who.scopes, member="r", tokens=1))
        await stack.enter_async_context(alive.hold(who.scopes, member="r", tokens=1))
        await refused(alive, who)
        deadline = time.monotonic() + 5
        while True:  # Only the living one sweeps.
            await alive.sweep()
            try:
                await take(alive, who)
                break
            except ConcurrencyLimited:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
        assert client.zcard("penstock:limit:{k}:c") >= 1
        await stack.enter_async_context(alive.hold(who.scopes, member="r", tokens=1))
        await refused(alive, who)


async def test_two_requests_with_the_same_id_take_two_places(make: Any) -> None:
    limits, who = make(), caller(running=1)
    async with limits.hold(who.scopes, member="chosen by the caller", tokens=1):
        await refused(limits, who)


@pytest.mark.parametrize("member", ["x" * 100_000, "\udcff", "\r\n", ""])
async def test_whatever_a_request_is_called_the_others_go_on(make: Any, member: str) -> None:
    limits = make()
    async with limits.hold(caller(running=1).scopes, member=member, tokens=10**30) as held:
        held.correct(10**40)
        await refused(limits, caller(running=1))
    assert not limits.local


# What happens when Redis does not do its part


async def test_f20_flushall_heals_with_the_next_sweep(make: Any, client: redis.Redis) -> None:
    limits, other, who = make(), make(), caller(running=2, requests=100)
    async with limits.hold(who.scopes, member="r", tokens=1), limits.hold(who.scopes, member="r", tokens=1):
        client.flushall()
        await limits.sweep()
        assert client.zcard("penstock:limit:{k}:c") == 2
        await refused(other, who)


async def test_f20_scripts_that_redis_forgot_are_sent_again(make: Any, client: redis.Redis) -> None:
    limits, who = make(), caller(requests=2)
    async with far_from_the_minute(client):
        await take(limits, who)
        client.script_flush()
        await take(limits, who)
        await refused(limits, who)
        assert client.hget("penstock:limit:{k}:r", "c") == b"2"
    assert not limits.local


async def test_f20_a_restarted_redis_is_used_without_a_failure(make: Any) -> None:
    with Valkey() as own:
        limits, who = make(own.url), caller(requests=1)
        await take(limits, who)
        own.restart()
        await take(limits, who)
        await refused(limits, who)
        assert not limits.local


@pytest.mark.alone
async def test_f19_a_hanging_redis_delays_five_requests_by_60_ms_and_then_none(
    make: Any, valkey: Valkey
) -> None:
    limits, who = make(), caller(requests=1000, running=1000)
    await take(limits, who)
    valkey.pause()
    for _ in range(5):
        assert not limits.local
        began = time.perf_counter()
        await take(limits, who)
        assert time.perf_counter() - began < 0.1  # 60 ms on a machine that does nothing else
    assert limits.local
    spent = []
    for _ in range(200):
        began = time.perf_counter()
        await take(limits, who)
        spent.append(time.perf_counter() - began)
    assert sorted(spent)[195] < 0.001


async def test_f19_a_request_that_waited_in_vain_does_not_wait_again_for_a_providers_key(
    make: Any, valkey: Valkey, client: redis.Redis
) -> None:
    limits, who, key = make(), caller(requests=10, running=5), caller("api_key:1", requests=10, running=5)
    await take(limits, key)
    async with limits.hold(who.scopes, member="r", tokens=1) as held:
        assert not held.alone
    valkey.pause()
    async with limits.hold(who.scopes, member="r", tokens=1) as held:
        assert held.alone
        began = time.perf_counter()
        async with limits.hold(key.scopes, member="r", tokens=1, alone=held.alone) as place:
            assert place.alone
            assert time.perf_counter() - began < limits_redis.TIMEOUT / 2
            valkey.resume()
            await limits.sweep()
            assert client.zcard("penstock:limit:{api_key:1}:c") == 1
    await until(lambda: client.zcard("penstock:limit:{api_key:1}:c") == 0)
    assert client.hget("penstock:limit:{api_key:1}:r", "c") == b"2"


@pytest.mark.alone
async def test_f19_a_redis_that_hangs_from_the_start_is_no_different(make: Any, valkey: Valkey) -> None:
    valkey.pause()
    limits, who = make(), caller(requests=1000)
    began = time.perf_counter()
    await asyncio.gather(*(take(limits, who) for _ in range(50)))
    assert time.perf_counter() - began < 0.15
    assert limits.local


@pytest.mark.parametrize(
    "url",
    ["unix:///nowhere/at/all", "redis://127.0.0.1:1/0", "nonsense", "redis://[", "rediss://127.0.0.1:1"],
)
async def test_f19_without_a_redis_to_connect_to_requests_are_served(make: Any, url: str) -> None:
    limits, who = make(url, workers=2), caller(requests=10)
    assert await count_taken([take(limits, who) for _ in range(20)]) == 5
    assert limits.local


async def test_f19_a_redis_that_is_away_is_noticed_although_nobody_asks(make: Any) -> None:
    limits = make("unix:///nowhere/at/all")
    for _ in range(limits_redis.ERRORS_IN_A_ROW):
        assert not limits.local
        await limits.sweep()
    assert limits.local


async def test_failures_with_an_answer_between_them_do_not_add_up(make: Any, valkey: Valkey) -> None:
    limits = make()
    for _ in range(limits_redis.ERRORS_IN_A_ROW):
        valkey.pause()
        await limits.sweep()
        valkey.resume()
        await limits.sweep()
        assert not limits.local


async def test_f19_each_process_grants_its_share_and_the_count_goes_on(
    make: Any, valkey: Valkey, client: redis.Redis
) -> None:
    clock = Clock()
    limits, who = make(workers=4, clock=clock), caller(requests=40, tokens=4000, running=8)
    async with far_from_the_minute(client):
        assert await count_taken([take(limits, who, tokens=10) for _ in range(4)]) == 4
        valkey.pause()
        await break_link(limits)
        # 10 of 40 are its share, and it has granted 4 of them.
        assert await count_taken([take(limits, who, tokens=10) for _ in range(20)]) == 6
        await refused(limits, caller("t", tokens=4000), tokens=1001)
        clock.now += 121
        places = caller("c", running=8)
        async with (
            limits.hold(places.scopes, member="r", tokens=1),
            limits.hold(places.scopes, member="r", tokens=1),
        ):
            await refused(limits, places)


async def test_f19_a_limit_smaller_than_the_number_of_processes_still_grants_one() -> None:
    limits = Limits("", workers=8)
    assert await count_taken([take(limits, caller(requests=3)) for _ in range(10)]) == 1
    await refused(limits, caller("zero", requests=0))


async def test_f19_redis_that_comes_back_learns_what_was_admitted(
    make: Any, valkey: Valkey, client: redis.Redis
) -> None:
    clock = Clock()
    limits, who = make(workers=2, clock=clock), caller(requests=100, tokens=100_000, running=10)
    async with far_from_the_minute(client):
        await take(limits, who, tokens=50)
        valkey.pause()
        await break_link(limits)
        assert await count_taken([take(limits, who, tokens=50) for _ in range(9)]) == 9
        held = await take(limits, who, tokens=50)
        held.correct(150)
        async with limits.hold(who.scopes, member="r", tokens=50):
            valkey.resume()
            await limits.sweep()
            assert limits.local  # it rests
            clock.now += limits_redis.REST_SECONDS
            await limits.sweep()
            assert not limits.local
            assert client.hget("penstock:limit:{k}:r", "c") == b"12"
            assert client.hget("penstock:limit:{k}:t", "c") == b"700"
            assert client.zcard("penstock:limit:{k}:c") == 1
        await limits.sweep()
        assert client.zcard("penstock:limit:{k}:c") == 0
        await limits.sweep()
        assert client.hget("penstock:limit:{k}:r", "c") == b"12"


async def test_f19_what_ended_while_redis_hung_is_released_when_it_is_back(
    make: Any, valkey: Valkey, client: redis.Redis
) -> None:
    clock = Clock()
    limits, who = make(clock=clock), caller(running=2)
    async with limits.hold(who.scopes, member="r", tokens=1), limits.hold(who.scopes, member="r", tokens=1):
        valkey.pause()
        await break_link(limits)
    valkey.resume()
    assert client.zcard("penstock:limit:{k}:c") == 2
    clock.now += limits_redis.REST_SECONDS
    await limits.sweep()
    assert client.zcard("penstock:limit:{k}:c") == 0


@pytest.mark.parametrize(("estimate", "total"), [(500, 200), (200, 500)])
async def test_f19_of_a_lost_release_only_what_may_be_done_twice_is_sent_again(
    make: Any, valkey: Valkey, client: redis.Redis, estimate: int, total: int
) -> None:
    """Whether Redis did it before it fell silent is not known: tokens may then be counted too high, never too low."""
    limits, who = make(), caller(tokens=10_000, running=5)
    async with far_from_the_minute(client):
        async with limits.hold(who.scopes, member="r", tokens=estimate) as held:
            valkey.pause()
            held.correct(total)
        await take(limits, caller("other", requests=10))  # its question times out, and the release with it
        valkey.resume()
        await until(
            lambda: client.hget("penstock:limit:{k}:t", "c") == b"%d" % total
        )  # it was done after all
        await limits.sweep()
        twice = total + max(0, total - estimate)
        assert client.hget("penstock:limit:{k}:t", "c") == b"%d" % twice
        assert client.zcard("penstock:limit:{k}:c") == 0


async def test_f21_a_full_redis_lets_go_of_places_at_once_and_counts_the_tokens_later(
    make: Any, client: redis.Redis
) -> None:
    limits, who = make(), caller(tokens=10_000, running=5)
    async with far_from_the_minute(client):
        async with limits.hold(who.scopes, member="r", tokens=100) as held:
            fill(client)
            held.correct(700)
        await until(lambda: client.zcard("penstock:limit:{k}:c") == 0)
        assert client.hget("penstock:limit:{k}:t", "c") == b"100"
        link = limits._link
        assert link is not None
        await until(lambda: len(link._undelivered) == 1)  # The refusal has arrived.
        repair(client)
        await limits.sweep()
        assert client.hget("penstock:limit:{k}:t", "c") == b"700"


async def test_f19_while_redis_is_away_nothing_piles_up(make: Any) -> None:
    limits = make("unix:///nowhere")
    await break_link(limits)
    assert await count_taken([take(limits, caller(requests=50, running=50)) for _ in range(500)]) == 50
    assert limits._link is not None
    assert len(limits._link._undelivered) == 0


async def test_f19_a_killed_redis_is_back_with_the_sweep_and_callers_never_wait_for_the_trial(
    make: Any,
) -> None:
    clock = Clock()
    with Valkey() as own:
        limits, who = make(own.url, clock=clock), caller(requests=1000)
        await take(limits, who)
        own.kill()
        await break_link(limits)
        for _ in range(3):
            clock.now += limits_redis.REST_SECONDS
            await take(limits, who)
            await limits.sweep()
            assert limits.local
        own.start()
        clock.now += limits_redis.REST_SECONDS
        await limits.sweep()
        assert not limits.local
        await take(limits, who)


def make_readonly(client: redis.Redis) -> None:
    client.replicaof("127.0.0.1", "1")


def fill(client: redis.Redis) -> None:
    client.config_set("maxmemory", 1)


def repair(client: redis.Redis) -> None:
    client.config_set("maxmemory", 0)
    client.replicaof("NO", "ONE")


@pytest.mark.parametrize("damage", [make_readonly, fill])
async def test_f21_a_redis_that_cannot_write_is_as_good_as_none(
    make: Any, client: redis.Redis, damage: Callable[[redis.Redis], None]
) -> None:
    clock = Clock()
    limits, who = make(workers=2, clock=clock), caller(requests=20, running=100)
    await take(limits, who)
    damage(client)
    assert await count_taken([take(limits, who) for _ in range(30)]) == 9
    await break_link(limits)
    clock.now += limits_redis.REST_SECONDS
    await limits.sweep()
    assert limits.local  # it answers, but still cannot write
    repair(client)
    clock.now += limits_redis.REST_SECONDS
    await limits.sweep()
    assert not limits.local


@pytest.mark.parametrize("damage", [make_readonly, fill])
async def test_f21_what_a_full_redis_still_does_proves_nothing(
    make: Any, client: redis.Redis, damage: Callable[[redis.Redis], None]
) -> None:
    limits, who, full = make(), caller(requests=1000, running=100), caller("full", requests=1)
    async with far_from_the_minute(client):
        await take(limits, full)
        damage(client)
        for _ in range(limits_redis.ERRORS_IN_A_ROW):
            assert not limits.local
            await take(limits, who)  # removes its place
            await refused(limits, full)
            await limits.sweep()
    assert limits.local


async def test_one_error_is_not_five(make: Any, valkey: Valkey) -> None:
    limits, who = make(), caller(requests=100)
    await take(limits, who)
    valkey.pause()
    await take(limits, who)
    valkey.resume()
    await take(limits, who)
    assert not limits.local


async def test_a_busy_event_loop_is_not_a_silent_redis(make: Any) -> None:
    limits, who = make(), caller(requests=1000)
    await take(limits, who)
    for turns in range(8):
        task = asyncio.create_task(take(limits, who))
        for _ in range(turns):
            await asyncio.sleep(0)
        time.sleep(limits_redis.TIMEOUT + 0.01)
        await task
        assert limits._book["k"].owed is None  # Redis was asked, and counted it


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


GARBAGE: dict[str, Callable[[redis.Redis, str, bytes], object]] = {
    "string": lambda client, key, bad: client.set(key, bad),
    "list": lambda client, key, bad: client.rpush(key, bad, bad),
    "hash": lambda client, key, bad: client.hset(key, mapping={"w": bad, "c": bad, "p": bad}),
    "counts": lambda client, key, bad: client.hset(
        key, mapping={"w": client.time()[0] // 60, "c": bad, "p": bad}
    ),
    "half a hash": lambda client, key, bad: client.hset(key, "c", bad),
    "set": lambda client, key, bad: client.sadd(key, bad),
    "members": lambda client, key, bad: client.zadd(key, {bad: float("inf"), b"x": -1.0, b"y": 1e300}),
}


@pytest.mark.parametrize("kind", GARBAGE)
@pytest.mark.parametrize("number", [None, b"nan", b"inf", b"-5", b"0x10", b"1e3", b"9" * 40])
async def test_r56_garbage_in_redis_is_deleted_and_never_believed(
    make: Any, client: redis.Redis, tmp_path: Path, kind: str, number: bytes | None
) -> None:
    trap = tmp_path / "trap"
    bad = number or pickle.dumps(Bomb(trap))
    limits, who = make(), caller(requests=3, tokens=30, running=3)
    async with far_from_the_minute(client), AsyncExitStack() as stack:
        for what in "rtc":
            GARBAGE[kind](client, f"penstock:limit:{{k}}:{what}", bad)
        await limits.sweep()
        taken = await count_taken(
            [stack.enter_async_context(limits.hold(who.scopes, member="r", tokens=10)) for _ in range(6)]
        )
        assert taken == 3
        for what in "rtc":
            client.delete(f"penstock:limit:{{k}}:{what}")
            GARBAGE[kind](client, f"penstock:limit:{{k}}:{what}", bad)
        await limits.sweep()
    await limits.sweep()
    await take(limits, who)
    assert not limits.local
    assert not trap.exists()


async def test_r56_places_far_in_the_future_are_not_believed(make: Any, client: redis.Redis) -> None:
    """Nor is a clock of Redis that was set back by an hour a reason to wait for an hour (F35)."""
    now = client.time()[0] * 1_000_000
    client.zadd("penstock:limit:{k}:c", {f"m{n}": now + 3_600_000_000 for n in range(5)})
    client.hset("penstock:limit:{k}:r", mapping={"w": now // 60_000_000 + 60, "c": 100, "p": 100})
    await take(make(), caller(running=5, requests=100))


# In one process


async def test_without_redis_the_process_keeps_the_limits() -> None:
    clock = Clock()
    limits, who = Limits("", clock=clock), caller(requests=60)
    assert limits.local
    assert await count_taken([take(limits, who) for _ in range(100)]) == 60
    clock.now += 60
    assert await count_taken([take(limits, who) for _ in range(10)]) == 0
    clock.now += 15
    assert await count_taken([take(limits, who) for _ in range(100)]) == 15
    clock.now += 120
    assert await count_taken([take(limits, who) for _ in range(100)]) == 60
    await limits.sweep()
    await limits.close()


@pytest.mark.parametrize("second", [0.0, 7.3, 31.0, 59.99])
@pytest.mark.parametrize("pattern", [[60], [10, 20, 30], [0, 60], [30, 30]])
async def test_retry_after_is_right_to_the_second(second: float, pattern: list[int]) -> None:
    clock = Clock(6000 + second)
    limits, who = Limits("", clock=clock), caller(tokens=60)
    for amount in pattern:
        if amount:
            await take(limits, who, amount)
        clock.now += 13
    for wanted in (1, 25, 60):
        began = clock.now
        error = await refused(limits, who, 60) if wanted == 60 else None
        if error is None:
            try:
                await take(limits, who, wanted)
                continue
            except RateLimited as limited:
                error = limited
        assert error.retry_after == int(error.retry_after or 0) >= 1
        clock.now = began + error.retry_after - 1
        if error.retry_after > 1:
            await refused(limits, who, wanted)
        clock.now = began + error.retry_after
        await take(limits, who, wanted)


async def test_a_request_larger_than_the_limit_is_told_so() -> None:
    error = await refused(Limits(""), caller(tokens=100), tokens=101)
    assert error.retry_after == 60
    assert "larger" in error.text


async def test_in_one_process_a_place_is_free_again_after_an_error_and_a_cancel() -> None:
    limits, who = Limits(""), caller(running=1)
    with pytest.raises(RuntimeError):
        async with limits.hold(who.scopes, member="r", tokens=1):
            raise RuntimeError
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0), limits.hold(who.scopes, member="r", tokens=1):
            await asyncio.sleep(60)
    await take(limits, who)


async def test_corrections_count_in_one_process_too() -> None:
    limits, who = Limits(""), caller(tokens=1000)
    held = await take(limits, who, 100)
    held.correct(900)
    await refused(limits, who, 101)
    held.correct(100)
    await take(limits, who, 900)
    late = await take(Limits("", clock=(clock := Clock())), caller(tokens=1000), 1000)
    clock.now += 60
    late.correct(400)
    assert late.states[0].admitted.tokens.read(int(clock.now * SECOND)) == Reading(0, 0, 400)  # type: ignore[attr-defined]  # what headers would say


async def test_idle_keys_are_forgotten_and_running_ones_are_not() -> None:
    clock = Clock()
    limits = Limits("", clock=clock)
    for number in range(1000):
        await take(limits, caller(f"k{number}", requests=10, tokens=10, running=3))
    async with limits.hold(caller("busy", running=1).scopes, member="r", tokens=1):
        assert len(limits._book) == 1001
        clock.now += 121
        for _ in range(60):
            await limits.sweep()
        assert len(limits._book) == 1
        await refused(limits, caller("busy", running=1))


async def test_f35_a_clock_that_jumps_never_refuses_for_longer_than_the_window() -> None:
    clock = Clock()
    limits, who = Limits("", clock=clock), caller(requests=1)
    await take(limits, who)
    clock.now += 3600
    await take(limits, who)


def test_durations_are_written_like_openai_writes_them() -> None:
    written = [duration(n) for n in (0, 1, SECOND, 59 * SECOND, WINDOW, 360 * SECOND, 90 * SECOND)]
    assert written == [b"0s", b"1s", b"1s", b"59s", b"1m0s", b"6m0s", b"1m30s"]


def test_what_a_window_says_about_waiting_is_the_first_moment_that_fits() -> None:
    for elapsed in (0, 1, 29 * SECOND + 7, WINDOW - 1):
        for current in (0, 3, 10, 17):
            for previous in (0, 1, 9, 10, 25):
                for amount in (1, 4, 10):
                    check_wait(Reading(elapsed, current, previous), amount, limit=10)


def check_wait(reading: Reading, amount: int, *, limit: int) -> None:
    wait = reading.wait(amount, limit)
    assert wait is not None
    assert (wait == 0) == reading.fits(amount, limit)
    window = Window(index=7, current=reading.current, previous=reading.previous)
    now = 7 * WINDOW + reading.elapsed
    if wait:
        assert not Window(7, reading.current, reading.previous).read(now + wait - 1).fits(amount, limit)
    assert window.read(now + wait).fits(amount, limit)
