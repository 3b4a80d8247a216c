"""Faults of upstreams and callers with a number in docs/threat-model.md, measured in time, dials and memory: F02 to F18."""

from __future__ import annotations

import asyncio
import http.client
import itertools
import json
import socket
import statistics
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from config.connection import Limits as ServerLimits
from providers.crypto import aad_for
from providers.wire import Credential, origin_of
from proxy import breaker
from tests.support import answers, faults
from tests.support.answers import SSE, Answer
from tests.support.http_server import Behaviour, Exchange
from tests.support.inprocess import PEPPERS, House
from tests.support.ports import LOOPBACK, blackhole
from tests.support.reconcile import name_of, reconcile
from tests.support.stalled import endless, stalled_reader
from tests.support.told import CHAT, Told, listen, question
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

SHORT = Answer().text


def add_keys(house: House, slug: str, *secrets: str) -> None:
    """Give a provider these keys instead of the one it has; their ids are 101, 102..."""
    upstreams = dict(house.watcher.snapshot.upstreams)
    number = house.watcher.snapshot.by_slug[slug]
    origin = origin_of(upstreams[number].endpoint.base_url)
    credentials = tuple(
        Credential(
            100 + n,
            f"uid-{n}",
            f"key {n}",
            house.keyring.seal(secret, aad=aad_for("providers.apikey", "secret", f"uid-{n}", origin)),
        )
        for n, secret in enumerate(secrets, 1)
    )
    upstreams[number] = replace(upstreams[number], credentials=credentials)
    house._change(upstreams=upstreams)


# -- F02: nothing comes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_f02_a_black_hole_is_left_at_the_connect_timeout(
    house: House, fallback: Upstream, stream: bool
) -> None:
    with blackhole() as port:
        hole = house.provide("hole", f"http://{LOOPBACK}:{port}/v1")
        second = house.provide("second", f"{fallback.url}/v1")
        house.activate((hole, "tiny"), (second, "tiny"))
        house.shorten(connect=0.8, first_token=5)

        told = listen(house.url, house.key, "hole", stream=stream)

    told.check(whole_text=SHORT)
    assert told.provider == "second"
    assert 0.8 <= told.took < 3
    first, second_record = house.records(2)
    assert first["error_code"] == "upstream_timeout"
    assert first["request_id"] == second_record["request_id"] == told.headers["x-request-id"] == "hole"


def test_f02_headers_without_a_body_do_not_stop_the_clock_of_the_first_token(
    pair: House, upstream: Upstream
) -> None:
    """Nor does a comment: what the status line was not sent for, can still be served by another."""

    async def only_comments(exchange: Exchange) -> None:
        await exchange.head(200, SSE)
        while True:
            await exchange.body(b": still thinking\n\n")
            await asyncio.sleep(0.05)

    pair.shorten(first_token=0.5, idle=5)
    upstream.behave(only_comments)

    told = listen(pair.url, pair.key, "comments")

    told.check(whole_text=SHORT)
    assert told.provider == "second" and not told.comments
    assert 0.5 <= told.took < 3


# -- F07: 429 ------------------------------------------------------------------------------------------------------------


def in_two_seconds() -> str:
    return formatdate(time.time() + 2, usegmt=True)


@pytest.mark.parametrize(
    ("after", "least", "most"),
    [("1", 1.0, 1.6), (in_two_seconds, 0.9, 2.8), (None, 0.9, 1.8)],
    ids=["seconds", "date", "absent"],
)
def test_f07_a_limited_provider_is_not_asked_before_its_time_and_soon_after_it(
    pair: House, upstream: Upstream, after: Any, least: float, most: float
) -> None:
    upstream.script(answers.status(429, retry_after=after() if callable(after) else after))
    served: list[Told] = []
    until = time.monotonic() + 5
    while len(upstream.ledger.asked) < 2 and time.monotonic() < until:
        served.append(listen(pair.url, pair.key, f"limited-{len(served)}", stream=False))

    assert all(told.text == SHORT for told in served)
    first, second = upstream.ledger.asked
    assert least <= second.at - first.at <= most
    assert pair.gateway.breakers.open() == {}
    assert not pair.watcher._suspects


@pytest.mark.parametrize("after", ["1000000000", "-5", "soon"])
def test_f07_what_a_provider_says_of_its_return_is_bounded(
    pair: House, upstream: Upstream, after: str
) -> None:
    upstream.behave(answers.status(429, retry_after=after))

    told = listen(pair.url, pair.key, "limited", model="first/tiny")

    assert (told.status, told.code) == (429, "rate_limit_exceeded")
    assert 1 <= int(told.headers["retry-after"]) <= 300
    assert told.took < 8


def test_f07_a_long_wait_is_told_at_once_and_later_requests_do_not_ask_again(
    pair: House, upstream: Upstream
) -> None:
    upstream.behave(answers.status(429, retry_after="60"))

    for number in range(3):
        told = listen(pair.url, pair.key, f"long-{number}", model="first/tiny")
        assert (told.status, told.code) == (429, "rate_limit_exceeded"), told.body
        assert 55 <= int(told.headers["retry-after"]) <= 72
        assert told.took < 5

    assert len(upstream.ledger.asked) == 1


def test_f07_one_keys_429_leaves_the_providers_other_key_at_work(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    add_keys(pair, "first", "sk-tired-0123456789", "sk-fresh-0123456789")
    tired = "Bearer sk-tired-0123456789"

    async def by_key(exchange: Exchange) -> None:
        limited = exchange.request.headers["authorization"] == tired
        await (answers.status(429, retry_after=30) if limited else answers.ok())(exchange)

    upstream.behave(by_key)
    tolds = [listen(pair.url, pair.key, f"keys-{number}", stream=False) for number in range(20)]

    assert {told.provider for told in tolds} == {"first"}
    assert [record.headers["authorization"] for record in upstream.ledger.asked].count(tired) <= 1
    assert not fallback.ledger.asked


def test_f09_a_refused_key_is_passed_over_for_the_providers_other_key(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    add_keys(pair, "first", "sk-dead-0123456789", "sk-good-0123456789")
    dead = "Bearer sk-dead-0123456789"

    async def by_key(exchange: Exchange) -> None:
        refused = exchange.request.headers["authorization"] == dead
        await (answers.unauthorized() if refused else answers.ok())(exchange)

    upstream.behave(by_key)
    tolds = [listen(pair.url, pair.key, f"keys-{number}", stream=False) for number in range(20)]

    assert {told.provider for told in tolds} == {"first"}
    assert pair.watcher._rejected <= {101}
    assert not fallback.ledger.asked


# -- F08: everything fails -----------------------------------------------------------------------------------------------

RATE, SECONDS = 100, 5


async def at_a_rate(send: Callable[[int], Awaitable[Any]], *, rate: int, seconds: int) -> list[Any]:
    """So many a second, whether or not the ones before have an answer."""
    loop, began = asyncio.get_running_loop(), time.monotonic()
    running: list[asyncio.Task[Any]] = []
    for number in range(rate * seconds):
        await asyncio.sleep(max(0.0, began + number / rate - time.monotonic()))
        running.append(loop.create_task(send(number)))  # type: ignore[arg-type]
    return list(await asyncio.gather(*running))


async def flood(house: House, seconds: int = SECONDS) -> list[int]:
    headers = {"Authorization": f"Bearer {house.key}"}
    async with aiohttp.ClientSession(headers=headers, connector=aiohttp.TCPConnector(limit=0)) as session:

        async def send(number: int) -> int:
            body = question(f"flood-{number}", model="only/tiny")
            async with session.post(f"{house.url}{CHAT}", json=body) as response:
                await response.read()
                return response.status

        return await at_a_rate(send, rate=RATE, seconds=seconds)


async def test_f08_retries_are_at_most_a_fifth_of_what_runs(
    house: House, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the circuit held closed, so that nothing but the budget bounds them."""
    monkeypatch.setattr(breaker, "FAILURES", 10**9)
    house.provide("only", f"{upstream.url}/v1")
    house.shorten(connect=10.0, first_token=10.0)  # Not what this is about, on a busy machine.
    upstream.behave(answers.status(500))

    statuses = await flood(house)

    assert set(statuses) == {502}
    asked = len(upstream.ledger.asked)
    assert RATE * SECONDS < asked <= RATE * SECONDS * 1.25 + 3, asked


async def test_f08_an_open_circuit_lets_a_few_through_and_no_more(house: House, upstream: Upstream) -> None:
    house.provide("only", f"{upstream.url}/v1")
    upstream.behave(answers.status(500))

    statuses = await flood(house, seconds=3)

    assert set(statuses) <= {502, 503}
    # What ran when the circuit opened, and then a trial now and again.
    times = [record.at for record in upstream.ledger.asked]
    assert sum(at > times[0] + 1 for at in times) <= 5 * 3
    assert len(times) <= 20 + 5 * 3


# -- F10: slow, and legal ------------------------------------------------------------------------------------------------


def telling_the_time(count: int, every: float) -> Behaviour:
    """A stream whose chunks say when they were sent, on the clock that all processes of a machine share."""

    async def behave(exchange: Exchange) -> None:
        answer = Answer(texts=())
        await answers.begin_stream(exchange, answer)
        for _ in range(count):
            await asyncio.sleep(every)
            (chunk,) = Answer(texts=[f"{time.monotonic():.6f} "]).content(exchange.request)
            await exchange.chunk(chunk)
        for data in answer.closing(exchange.request):
            await exchange.body(data)
        await exchange.end()

    return behave


@pytest.mark.alone
async def test_f10_a_slow_stream_is_passed_on_as_it_comes_and_never_cut_for_being_slow(
    pair: House, upstream: Upstream
) -> None:
    """Twenty streams, each longer than the idle limit and never silent for so long."""
    pair.shorten(idle=0.6, first_token=0.6, stream=20)
    upstream.behave(telling_the_time(10, 0.25))
    headers = {"Authorization": f"Bearer {pair.key}"}
    delays: list[float] = []
    async with aiohttp.ClientSession(headers=headers) as session:

        async def one(number: int) -> bytes:
            body = question(f"drip-{number}", stream=True)
            async with session.post(f"{pair.url}{CHAT}", json=body) as response:
                received = b""
                async for part in response.content.iter_any():
                    now = time.monotonic()
                    for block in part.split(b"\n\n"):
                        if b'"content":"' in block and b'"role"' not in block:
                            sent = json.loads(block.removeprefix(b"data: "))["choices"][0]["delta"]["content"]
                            delays.append(now - float(sent))
                    received += part
                return received

        texts = await asyncio.gather(*(one(number) for number in range(20)))

    assert all(text.endswith(b"data: [DONE]\n\n") for text in texts)
    assert len(delays) >= 20 * 9
    assert statistics.quantiles(delays, n=20)[-1] < 0.05, max(delays)


def test_f10_a_byte_at_a_time_is_progress_and_the_total_cap_ends_it(pair: House, upstream: Upstream) -> None:
    pair.shorten(idle=0.5, first_token=5, stream=1.5)
    upstream.behave(answers.ok(chunks=1000, delay=0.05))

    told = listen(pair.url, pair.key, "endless")

    told.check(whole_text="".join(answers.words(1000)))
    assert told.code == "upstream_interrupted" and told.closed
    assert 1.5 <= told.took < 10


# -- F13: the race of every pool -----------------------------------------------------------------------------------------


@pytest.mark.alone
async def test_f13_two_thousand_requests_while_the_provider_closes_connections_lose_none(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    ways = itertools.cycle(
        [
            answers.ok(),
            faults.close_after_answer(),
            answers.ok(),
            faults.close_after_answer(after=0.002),
            faults.close_after_answer(say_so=True),
            faults.close_after_answer(reset=True),
        ]
    )

    async def in_turn(exchange: Exchange) -> None:
        await next(ways)(exchange)

    upstream.behave(in_turn)
    headers = {"Authorization": f"Bearer {pair.key}"}
    numbers = iter(range(2000))
    seen: list[tuple[int, str]] = []
    async with aiohttp.ClientSession(headers=headers) as session:

        async def caller() -> None:
            for number in numbers:
                body = question(f"race-{number}", stream=number % 2 == 0)
                async with session.post(f"{pair.url}{CHAT}", json=body) as response:
                    text = await response.read()
                    seen.append((response.status, response.headers["x-penstock-provider"]))
                    assert SHORT.split()[-1].encode() in text

        await asyncio.gather(*(caller() for _ in range(12)))

    assert len(seen) == 2000 and set(seen) == {(200, "first")}
    assert not fallback.ledger.asked
    assert len(upstream.ledger.asked) == 2000


# -- F16: who does not read ----------------------------------------------------------------------------------------------


def test_f16_a_caller_who_reads_nothing_is_cut_the_provider_stopped_and_the_row_written(
    tmp_path: Path, settings: Any, upstream: Upstream
) -> None:
    settings.PENSTOCK_PEPPERS = PEPPERS
    limits = ServerLimits(grace_seconds=0, drain_seconds=0.2, write_seconds=1.0, sweep_seconds=0.1)
    upstream.behave(endless())
    with House(tmp_path, server=limits) as house:
        number = house.provide("first", f"{upstream.url}/v1")
        house.shorten(idle=0.5, stream=60)  # the caller's slowness is not the provider's silence
        house.activate((number, "tiny"))
        with closing(stalled_reader(house.port, house.key, "stalled")):
            upstream.ledger.wait_for(lambda ledger: ledger.asked and ledger.last.closed_by_peer_at, timeout=6)
            record = house.records()[0]

    assert record["status"] == "client_disconnected" and record["client_disconnected"]
    assert upstream.ledger.last.bytes_sent < 24 * 1024 * 1024  # what kernels hold, and no more


def test_f16_a_caller_who_pauses_gets_every_byte_in_order(pair: House, upstream: Upstream) -> None:
    text = [f"{number:07d} " * 500 for number in range(2000)]  # 8 MB
    upstream.behave(answers.ok(texts=text))
    pair.shorten(stream=60)
    with closing(stalled_reader(pair.port, pair.key, "pausing")) as wire:
        time.sleep(1.2)  # longer than the idle limit
        wire.settimeout(20)
        received = bytearray()
        while not received.endswith(b"0\r\n\r\n"):
            part = wire.recv(1 << 20)
            assert part, bytes(received[-200:])
            received += part
    assert received.rstrip().endswith(b"0") and b"data: [DONE]" in received[-200:]
    numbers = [int(piece) for piece in _texts(bytes(received)).split()[::500]]
    assert numbers == list(range(2000))
    assert pair.records()[0]["status"] == "success"


def _texts(raw: bytes) -> str:
    body, rest = bytearray(), raw.partition(b"\r\n\r\n")[2]
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        body += rest[: int(size, 16)]
        rest = rest[int(size, 16) + 2 :]
    return Told("pausing", 200, {"content-type": "text/event-stream"}, bytes(body)).text


# -- F17: one connection, several requests ---------------------------------------------------------------------------------


def echoing() -> Behaviour:
    """An answer that is the request's own name."""

    async def behave(exchange: Exchange) -> None:
        await answers.ok(texts=[name_of(exchange.request)])(exchange)

    return behave


def request_bytes(house: House, name: str, body: bytes | None = None, **more: Any) -> bytes:
    content = json.dumps(question(name, **more)).encode() if body is None else body
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {house.key}\r\n"
        f"x-request-id: {name}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    return head.encode() + content


def test_f17_each_answer_on_a_kept_connection_belongs_to_its_request(pair: House, upstream: Upstream) -> None:
    """Good ones, refused ones, and ones that no provider could answer, one after another."""
    upstream.behave(echoing())
    connection = http.client.HTTPConnection(LOOPBACK, pair.port, timeout=10)
    headers = {"Authorization": f"Bearer {pair.key}", "Content-Type": "application/json"}
    bodies: list[tuple[bytes, int]] = []
    for number in range(5):
        bodies += [
            (json.dumps(question(f"kept-{number}", stream=number % 2 == 0)).encode(), 200),
            (b"{", 400),
            (json.dumps(question("nobody", model="nothing")).encode(), 404),
            (json.dumps(question("refused", model="first/do-policy")).encode(), 400),
        ]
    opened = 0
    for position, (body, status) in enumerate(bodies):
        if connection.sock is None:
            opened += 1
        connection.request("POST", CHAT, body, {**headers, "x-request-id": f"kept-id-{position}"})
        response = connection.getresponse()
        text = response.read()
        assert response.status == status, text
        assert response.headers["x-request-id"] == f"kept-id-{position}"
        if status == 200:
            assert json.loads(body)["messages"][0]["content"].encode() in text
    connection.close()
    assert opened == 1


def test_f17_pipelined_requests_are_answered_in_their_order_each_with_its_own(
    pair: House, upstream: Upstream
) -> None:
    upstream.behave(echoing())
    names = [f"pipe-{number}" for number in range(6)]
    sent = b"".join(
        request_bytes(pair, name, b"{" if number == 3 else None, stream=number % 2 == 1)
        for number, name in enumerate(names)
    )
    with socket.create_connection((LOOPBACK, pair.port), timeout=5) as wire:
        wire.sendall(sent)
        received = b""
        while len(answers_in(received)) < len(names):
            part = wire.recv(65_536)
            assert part, received
            received += part
    for number, (name, (status, headers, body)) in enumerate(zip(names, answers_in(received), strict=True)):
        assert f"x-request-id: {name}".encode() in headers
        assert status == (400 if number == 3 else 200)
        assert name.encode() in body


def answers_in(raw: bytes) -> list[tuple[int, bytes, bytes]]:
    """Status, head and body of each whole answer that a connection gave."""
    found = []
    while raw:
        head, _, rest = raw.partition(b"\r\n\r\n")
        if b"content-length: " in head:
            length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
            body, raw, whole = rest[:length], rest[length:], len(rest) >= length
        else:
            body, end, raw = rest.partition(b"0\r\n\r\n")
            whole = bool(end)
        if not whole:
            break
        found.append((int(head.split()[1]), head, body))
    return found


def test_f17_a_caller_that_has_only_closed_its_sending_side_is_served_or_cut_but_never_mixed_up(
    pair: House, upstream: Upstream
) -> None:
    upstream.behave(echoing())
    with socket.create_connection((LOOPBACK, pair.port), timeout=5) as wire:
        wire.sendall(request_bytes(pair, "half-closed"))
        wire.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: wire.recv(65_536), b""))
    assert not answer or b"half-closed" in answer
    told = listen(pair.url, pair.key, "the-next")
    assert told.text == "the-next"
    assert {record["request_id"] for record in pair.records(1)} <= {"half-closed", "the-next"}


def test_f17_what_an_abandoned_stream_left_behind_reaches_nobody(pair: House, upstream: Upstream) -> None:
    """The connection to the provider that a caller's leaving cut short is not used for the next request."""

    async def slowly(exchange: Exchange) -> None:
        name = name_of(exchange.request)
        await answers.ok(texts=[f"{name}-{number} " for number in range(10)], delay=0.01)(exchange)

    upstream.behave(slowly)
    for number in range(20):
        with socket.create_connection((LOOPBACK, pair.port), timeout=5) as wire:
            wire.sendall(request_bytes(pair, f"left-{number}", stream=True))
            wire.recv(400)
        told = listen(pair.url, pair.key, f"stays-{number}")
        told.check()
        assert told.text.split() == [f"stays-{number}-{n}" for n in range(10)]


# -- F18: not offered --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_f18_an_idempotency_key_is_not_interpreted_and_two_requests_stay_two(
    pair: House, upstream: Upstream, stream: bool
) -> None:
    numbers = itertools.count(1)

    async def counted(exchange: Exchange) -> None:
        await answers.ok(texts=[f"answer{next(numbers)}"])(exchange)

    upstream.behave(counted)
    same = {"Idempotency-Key": "the-same-for-both"}

    tolds = [listen(pair.url, pair.key, "idem", stream=stream, headers=same) for _ in range(2)]

    assert [told.text for told in tolds] == ["answer1", "answer2"]
    assert len(upstream.ledger.asked) == 2
    assert len(pair.records(2)) == 2
    assert not any("idempotency" in name.lower() for name, _ in upstream.ledger.last.header_items)


# -- silence that is allowed ---------------------------------------------------------------------------------------------


def test_a_committed_stream_that_pauses_is_kept_alive_by_comments_that_are_no_events(
    pair: House, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("proxy.patience.KEEPALIVE_SECONDS", 0.2)
    pair.shorten(idle=5, first_token=5)
    upstream.behave(answers.ok(chunks=3, delay=0.7))

    told = listen(pair.url, pair.key, "pausing")

    told.check(whole_text="".join(answers.words(3)))
    assert told.ended_well
    assert 3 <= len(told.comments) <= 8
    assert set(told.comments) == {b": keep-alive"}
    # None before the commit: until then another provider may still answer.
    assert not told.blocks[0].startswith(b":")
    reconcile([told], pair.records(), {"first": upstream})


def test_every_attempt_says_why_it_was_made_and_how_long_it_took(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.script(answers.status(503))
    fallback.behave(answers.ok(chunks=3, first_after=0.1))

    told = listen(pair.url, pair.key, "traced")

    assert told.ended_well
    first, second = pair.records(2)
    for record in (first, second):
        assert record["trace"], record
        text = json.dumps(record["trace"])
        assert "first" in text and "sk-upstream" not in text and pair.key not in text
    assert second["ttft_ms"] >= 90 and second["duration_ms"] >= second["ttft_ms"]
    text = json.dumps(second["trace"])
    assert all(word in text for word in ("queue", "connect", "first_token", "total")), text
