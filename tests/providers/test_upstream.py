"""Talking to a provider: the real clients against real sockets that behave badly."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import os
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import trustme
import uvloop

from providers import connections, crypto, errors, http1, replies, upstream
from providers.adapters import KINDS
from providers.destination import Policy
from providers.wire import Answer, Credential, Endpoint, Timeouts, WireRequest

pytestmark = pytest.mark.no_database

SECRET = "sk-canary-5f2d0c9be1"
UID = "7b7f6f0e-2f53-4a3c-9a0f-3b1e6a1d7c55"

Handler = Callable[["Exchange"], Awaitable[None]]


@dataclass
class Exchange:
    """One request as the server saw it, and the way to answer it byte by byte."""

    head: bytes
    body: bytes
    writer: asyncio.StreamWriter

    @property
    def headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        return {
            name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
        }

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self, body: bytes, *, status: str = "200 OK", extra: str = "") -> None:
        await self.send(f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\n{extra}\r\n".encode() + body)

    def reset(self) -> None:
        """Close with a reset instead of an end."""
        raw = self.writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
        self.writer.close()


@dataclass
class Server:
    """A raw HTTP/1.1 server that leaves every answer to the test."""

    handler: Handler
    port: int = 0
    connections: int = 0
    exchanges: list[Exchange] = field(default_factory=list)
    writers: list[asyncio.StreamWriter] = field(default_factory=list)
    closed: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n"))[:-4]
                exchange = Exchange(head, b"", writer)
                exchange.body = await reader.readexactly(int(exchange.headers.get("content-length", "0")))
                self.exchanges.append(exchange)
                await self.handler(exchange)
                if writer.is_closing():
                    break
        self.closed.set()
        writer.close()

    @contextlib.asynccontextmanager
    async def listening(self, context: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self.writers:
                writer.transport.abort()


def endpoint(port: int, **changes: Any) -> Endpoint:
    base = Endpoint(
        provider_id=1,
        uid="e1",
        slug="box",
        name="Box",
        kind="openai-compatible",
        base_url=f"http://127.0.0.1:{port}/v1",
        allow_private=True,
        timeouts=Timeouts(connect=2.0),
    )
    return replace(base, **changes)


def question(where: Endpoint) -> WireRequest:
    chat = KINDS["openai-compatible"].chat
    assert chat is not None
    return chat.request(where, {"messages": [{"role": "user", "content": "hi"}]}, "m", True)


def credential(where: Endpoint, value: str = SECRET) -> Credential:
    aad = crypto.aad_for("providers.apikey", "secret", UID, where.origin)
    return Credential(key_id=1, uid=UID, name="default", stored=crypto.current_keyring().seal(value, aad=aad))


@pytest.fixture(autouse=True)
def keyring() -> Iterator[None]:
    before = crypto._keyring
    crypto.install(crypto.Keyring.fresh())
    yield
    crypto.install(before)


@pytest.fixture
async def pools() -> AsyncIterator[connections.Pools]:
    async with connections.Pools() as pool:
        yield pool


async def quiet(exchange: Exchange) -> None:
    await exchange.answer(b'{"ok": true}')


async def test_a_streamed_answer_arrives_piece_by_piece_with_the_key_and_without_compression(
    pools: connections.Pools,
) -> None:
    go_on = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\ndata: 1\n\n\r\n")
        await go_on.wait()
        await exchange.send(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    async with Server(handler).listening() as server:
        where = endpoint(server.port, headers=(("X-Team", "blue"),))
        reply = await upstream.stream(pools, where, question(where), credential=credential(where))
        assert reply.status == 200
        assert await reply.read() == b"data: 1\n\n"
        go_on.set()
        assert await upstream.read_bounded(reply, 100) == b"data: 2\n\n"
        assert await reply.read() == b""
        reply.close()
        seen = server.exchanges[0].headers
    assert seen["authorization"] == f"Bearer {SECRET}"
    assert seen["accept-encoding"] == "identity"
    assert seen["x-team"] == "blue"
    assert seen["content-type"] == "application/json"
    assert "cookie" not in seen


async def test_a_connection_goes_back_to_the_pool_when_its_answer_was_read(pools: connections.Pools) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(server.port)
        for _ in range(3):
            reply = await upstream.stream(pools, where, question(where), credential=None)
            await upstream.read_bounded(reply, 100)
            reply.close()
            reply.close()
        assert server.connections == 1


async def test_closing_a_reply_drops_the_connection_at_once(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n\r\ndata: 1\n\n")
        while True:
            await exchange.send(b": more\n\n")
            await asyncio.sleep(0.01)

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        await reply.read()
        reply.close()
        await asyncio.wait_for(server.closed.wait(), 1.0)


async def test_cookies_of_an_answer_are_forgotten(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}", extra="Set-Cookie: a=b\r\n")

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        for _ in range(2):
            await upstream.read_bounded(
                await upstream.stream(pools, where, question(where), credential=None), 9
            )
        assert "cookie" not in server.exchanges[1].headers


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "303 See", "307 Temporary", "308 Permanent"])
async def test_r23_a_redirect_is_never_followed(
    pools: connections.Pools, status: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with Server(quiet).listening() as trap:

        async def handler(exchange: Exchange) -> None:
            location = f"http://127.0.0.1:{trap.port}/steal?key={SECRET}"
            await exchange.answer(b"", status=status, extra=f"Location: {location}\r\n")

        async with Server(handler).listening() as server:
            where = endpoint(server.port)
            with pytest.raises(errors.UpstreamRedirect) as caught:
                await upstream.stream(pools, where, question(where), credential=credential(where))
            answer = await ask(where, credential(where))
        assert answer.status == int(status[:3])
        assert trap.connections == 0
    assert f":{trap.port}/steal" in caught.value.detail
    assert SECRET not in caught.value.detail
    assert [record.location for record in caplog.records if record.message == "upstream_redirect"] == [  # type: ignore[attr-defined]
        f"http://127.0.0.1:{trap.port}/steal"
    ]


async def ask(where: Endpoint, key: Credential | None = None, **limits: Any) -> Answer:
    request = WireRequest("GET", f"{where.base_url}/models")
    return await upstream.ask(where, request, credential=key, **{"timeout": 5.0, **limits})


@pytest.mark.parametrize(
    "base_url", ["http://169.254.169.254/v1", "http://[::ffff:a9fe:a9fe]/v1", "http://0.0.0.0:80/v1"]
)
async def test_r19_a_metadata_address_is_refused_when_dialled(
    pools: connections.Pools, base_url: str
) -> None:
    where = endpoint(0, base_url=base_url)
    with pytest.raises(errors.DestinationNotAllowed):
        await upstream.stream(pools, where, question(where), credential=None)
    with pytest.raises(errors.DestinationNotAllowed):
        await ask(where)


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "127.1", "0177.0.0.1"])
async def test_r22_other_spellings_of_an_address_reach_nothing(pools: connections.Pools, host: str) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(0, kind="openai", allow_private=False, base_url=f"https://{host}:{server.port}/v1")
        with pytest.raises(errors.ProviderError):
            await upstream.stream(pools, where, question(where), credential=credential(where))
        with pytest.raises(errors.ProviderError):
            await ask(where, credential(where))
        assert server.connections == 0


async def test_r20_a_vendor_may_not_dial_loopback_unless_the_row_allows_it(pools: connections.Pools) -> None:
    async with Server(quiet).listening() as server:
        vendor = endpoint(server.port, kind="openai", allow_private=False)
        with pytest.raises(errors.DestinationNotAllowed):
            await upstream.stream(pools, vendor, question(vendor), credential=credential(vendor))
        with pytest.raises(errors.DestinationNotAllowed):
            await ask(vendor, credential(vendor))
        assert server.connections == 0
        allowed = replace(vendor, allow_private=True)
        reply = await upstream.stream(pools, allowed, question(allowed), credential=credential(allowed))
        assert reply.status == 200
        reply.close()


async def test_r20_our_own_listener_is_never_dialled(pools: connections.Pools, settings: Any) -> None:
    async with Server(quiet).listening() as server:
        settings.HOST, settings.PORT = "127.0.0.1", server.port
        upstream._own_addresses._until = 0.0
        where = endpoint(server.port)
        try:
            with pytest.raises(errors.DestinationNotAllowed):
                await upstream.stream(pools, where, question(where), credential=None)
            with pytest.raises(errors.DestinationNotAllowed):
                await ask(where)
        finally:
            upstream._own_addresses._until = 0.0
        assert server.connections == 0


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A name server: what it knows, and nothing else. Addresses stay what they are."""
    known: dict[str, list[str]] = {}
    real = socket.getaddrinfo

    def look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        if name in known:
            if not known[name]:
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return [row for address in known[name] for row in real(address, port, *args, **options)]
        return real(host, port, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


async def test_r21_one_forbidden_record_refuses_all(
    pools: connections.Pools, names: dict[str, list[str]]
) -> None:
    async with Server(quiet).listening() as server:
        for order in (["127.0.0.1", "169.254.169.254"], ["169.254.169.254", "127.0.0.1"]):
            names[f"mixed{len(order[0])}.example"] = order
            where = endpoint(0, base_url=f"http://mixed{len(order[0])}.example:{server.port}/v1")
            with pytest.raises(errors.DestinationNotAllowed):
                await upstream.stream(pools, where, question(where), credential=None)
            with pytest.raises(errors.DestinationNotAllowed):
                await ask(where)
        assert server.connections == 0


async def test_r21_a_name_that_moves_to_a_forbidden_address_is_refused_there(
    names: dict[str, list[str]],
) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(0, base_url=f"http://moving.example:{server.port}/v1")
        names["moving.example"] = ["127.0.0.1"]
        async with connections.Pools() as pools:
            await upstream.read_bounded(
                await upstream.stream(pools, where, question(where), credential=None), 99
            )
            names["moving.example"] = ["169.254.169.254"]
            for pool in pools._pools.values():
                pool._look_ups.clear()
            # The pooled connection leads to where it was checked; a new one is checked anew.
            await upstream.read_bounded(
                await upstream.stream(pools, where, question(where), credential=None), 99
            )
        assert server.connections == 1
        async with connections.Pools() as pools:
            with pytest.raises(errors.DestinationNotAllowed):
                await upstream.stream(pools, where, question(where), credential=None)
        assert (await asyncio.gather(ask(where), return_exceptions=True))[
            0
        ].__class__ is errors.DestinationNotAllowed
        assert server.connections == 1


async def test_f12_an_unknown_name_fails_at_once(
    pools: connections.Pools, names: dict[str, list[str]]
) -> None:
    names["nowhere.example"] = []
    where = endpoint(0, base_url="https://nowhere.example/v1")
    started = time.monotonic()
    with pytest.raises(errors.ConnectFailed):
        await upstream.stream(pools, where, question(where), credential=None)
    with pytest.raises(errors.ConnectFailed):
        await ask(where)
    assert time.monotonic() - started < 1.0


async def test_f12_a_slow_name_server_holds_up_nobody_else(
    pools: connections.Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, release = socket.getaddrinfo, threading.Event()

    def look_up(host: Any, *args: Any, **options: Any) -> Any:
        if host == "slow.example":
            release.wait(10)
            raise socket.gaierror(socket.EAI_AGAIN, "try again")
        return real(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    slow = endpoint(0, base_url="https://slow.example/v1", timeouts=Timeouts(connect=1.0))
    async with Server(quiet).listening() as server:
        waiting = asyncio.create_task(upstream.stream(pools, slow, question(slow), credential=None))
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        assert not waiting.done()
        reply.close()
        with pytest.raises(errors.UpstreamTimeout):
            await waiting
    release.set()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Evil", "a\r\nAuthorization: Bearer x"), ("X-Evil", "a\nb"), ("X-Evil", "a\0b"), ("X-Evil", "\u0100"), ("X Evil", "a"),
        ("X-Evil:", "a"), ("X\r\nY", "a"), ("Host", "a"), ("Content-Length", "0"), ("Transfer-Encoding", "chunked"), ("Connection", "x"),
        ("Upgrade", "x"), ("TE", "x"), ("Authorization", "x"), ("Cookie", "a=b"), ("X-Forwarded-For", "1.1.1.1"), ("X-Long", "a" * 9000),
    ],
)  # fmt: skip
async def test_r27_a_header_put_into_the_database_by_hand_is_never_sent(
    pools: connections.Pools, name: str, value: str
) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(server.port, headers=((name, value),))
        with pytest.raises(errors.HeaderNotAllowed) as caught:
            await upstream.stream(pools, where, question(where), credential=credential(where))
        with pytest.raises(errors.HeaderNotAllowed):
            await ask(where)
        assert caught.value.status == 502
        assert server.connections == 0


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd", "gzip, gzip", "deflate"])
async def test_r29_a_compressed_answer_is_refused_unread(pools: connections.Pools, encoding: str) -> None:
    bomb = gzip.compress(b"0" * 10_000_000)

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(bomb, extra=f"Content-Encoding: {encoding}\r\n")

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        with pytest.raises(errors.ProtocolError, match=r".*") as caught:
            await upstream.stream(pools, where, question(where), credential=None)
        with pytest.raises(errors.ProtocolError):
            await ask(where)
    assert "compressed" in caught.value.detail


async def test_r30_a_body_above_its_limit_is_refused_and_the_connection_closed(
    pools: connections.Pools,
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000000\r\n\r\n")
        while not exchange.writer.is_closing():
            await exchange.send(b"x" * 65_536)

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        with pytest.raises(errors.ProtocolError):
            await upstream.read_bounded(reply, 1_000_000)
        await asyncio.wait_for(server.closed.wait(), 2.0)
        with pytest.raises(errors.ProtocolError):
            await ask(where, max_bytes=1_000_000)


async def test_r53_an_upstream_that_repeats_our_key_in_its_error_tells_nobody(
    pools: connections.Pools,
) -> None:
    half = len(SECRET) // 2

    async def handler(exchange: Exchange) -> None:
        body = b'{"error": {"message": "bad key ' + SECRET.encode() + b'"}}'
        cut = body.index(SECRET.encode()) + half
        await exchange.send(f"HTTP/1.1 401 No\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body[:cut])
        await asyncio.sleep(0.05)
        await exchange.send(body[cut:])

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=credential(where))
        body = await upstream.read_bounded(reply, 10_000)
        answer = await ask(where, credential(where))
    assert SECRET.encode() not in body
    assert crypto.DOTS.encode() in body
    assert answer.body == body


async def test_r53_an_error_that_breaks_off_within_our_key_tells_nothing_of_it(
    pools: connections.Pools,
) -> None:
    said = b"bad key " + SECRET[:-1].encode()

    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 401 No\r\nContent-Length: 1000\r\n\r\n" + said)
        exchange.writer.close()

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=credential(where))
        assert await upstream.read_bounded(reply, 10_000) == b"bad key "


async def test_r30_of_a_huge_error_only_the_beginning_is_kept(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000000\r\n\r\n")
        while not exchange.writer.is_closing():
            await exchange.send(b"x" * 65_536)

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=credential(where))
        assert len(await upstream.read_bounded(reply, 1_000_000)) == replies.MAX_ERROR_BYTES


async def test_f01_a_closed_port_is_a_connect_failure_at_once(pools: connections.Pools) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = endpoint(free.getsockname()[1])
        started = time.monotonic()
        with pytest.raises(errors.ConnectFailed):
            await upstream.stream(pools, where, question(where), credential=None)
        with pytest.raises(errors.ConnectFailed):
            await ask(where)
    assert time.monotonic() - started < 1.9


@contextlib.contextmanager
def black_hole() -> Iterator[int]:
    """A port whose queue of connections is full, so that no further one is answered."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()[1]


async def test_f02_a_black_hole_is_given_up_at_the_connect_timeout(pools: connections.Pools) -> None:
    with black_hole() as port:
        where = endpoint(port, timeouts=Timeouts(connect=0.4))
        for dial in (upstream.stream(pools, where, question(where), credential=None), ask(where)):
            started = time.monotonic()
            with pytest.raises(errors.UpstreamTimeout):
                await dial
            assert 0.35 < time.monotonic() - started < 4


async def test_f02_a_silent_upstream_is_given_up_when_the_time_for_a_question_is_over() -> None:
    async def handler(exchange: Exchange) -> None:
        await asyncio.sleep(30)

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        started = time.monotonic()
        with pytest.raises(errors.UpstreamTimeout):
            await ask(where, timeout=0.3)
        assert 0.25 < time.monotonic() - started < 10


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03 garbage\r\n\r\n", b"HTTP/1.1 banana OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nno colon here\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX-Big: " + b"x" * 300_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(9000)) + b"\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5000, b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 5000,
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    ],
    ids=["binary", "status", "no-colon", "huge-header", "many-headers", "flood-100", "flood-103", "switch"],
)  # fmt: skip
async def test_f06_what_is_not_http_is_a_protocol_error(pools: connections.Pools, garbage: bytes) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(garbage)
        await asyncio.sleep(5)

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        with pytest.raises(errors.ProtocolError):
            async with asyncio.timeout(3):
                await upstream.stream(pools, where, question(where), credential=None)


async def test_f06_a_few_early_hints_are_no_flood(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" * 3)
        await exchange.answer(b"{}")

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        assert await upstream.read_bounded(reply, 10) == b"{}"


@pytest.mark.parametrize("how", ["end", "reset", "half"])
async def test_a_fresh_connection_that_closes_without_an_answer_is_not_dialled_twice(
    pools: connections.Pools, how: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        if how == "half":
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-")
        exchange.reset() if how == "reset" else exchange.writer.close()

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        with pytest.raises((errors.ConnectFailed, errors.ProtocolError)):
            await upstream.stream(pools, where, question(where), credential=None)
        assert server.connections == 1


@pytest.mark.parametrize("how", ["end", "reset"])
async def test_f13_a_pooled_connection_closed_by_the_peer_is_retried_once_on_a_fresh_one(
    pools: connections.Pools, how: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange is server.exchanges[0]:
            await exchange.answer(b"first")
        elif exchange.writer is server.writers[0]:
            exchange.reset() if how == "reset" else exchange.writer.close()
        else:
            await exchange.answer(b"again")

    server = Server(handler)
    async with server.listening():
        where = endpoint(server.port)
        for expected in (b"first", b"again"):
            reply = await upstream.stream(pools, where, question(where), credential=None)
            assert await upstream.read_bounded(reply, 100) == expected
            reply.close()
        assert len(server.exchanges) == 3
        assert server.exchanges[2].body == server.exchanges[1].body != b""


async def test_f13_nothing_is_sent_twice_once_an_answer_has_begun(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange is server.exchanges[0]:
            await exchange.answer(b"first")
        else:
            await exchange.send(b"HTTP/1.1 200 OK\r\nContent-")
            exchange.writer.close()

    server = Server(handler)
    async with server.listening():
        where = endpoint(server.port)
        await upstream.read_bounded(
            await upstream.stream(pools, where, question(where), credential=None), 100
        )
        with pytest.raises(errors.ConnectFailed):
            await upstream.stream(pools, where, question(where), credential=None)
        assert len(server.exchanges) == 2


async def test_f13_a_second_closed_connection_is_an_error(pools: connections.Pools) -> None:
    async def handler(exchange: Exchange) -> None:
        if exchange is server.exchanges[0]:
            await exchange.answer(b"first")
        else:
            exchange.writer.close()

    server = Server(handler)
    async with server.listening():
        where = endpoint(server.port)
        await upstream.read_bounded(
            await upstream.stream(pools, where, question(where), credential=None), 100
        )
        with pytest.raises(errors.ConnectFailed):
            await upstream.stream(pools, where, question(where), credential=None)
        assert len(server.exchanges) == 3


async def test_f13_no_request_fails_while_the_peer_closes_after_every_answer(
    pools: connections.Pools,
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"{}")
        exchange.writer.close()

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        for _ in range(200):
            reply = await upstream.stream(pools, where, question(where), credential=None)
            assert await upstream.read_bounded(reply, 100) == b"{}"


@pytest.mark.parametrize("how", ["end", "reset"])
@pytest.mark.parametrize("framing", ["Transfer-Encoding: chunked", "Content-Length: 900"])
async def test_f04_a_body_that_breaks_off_is_an_interruption(
    pools: connections.Pools, how: str, framing: str
) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(f"HTTP/1.1 200 OK\r\n{framing}\r\n\r\n9\r\ndata: 1\n\n\r\n".encode())
        await asyncio.sleep(0.05)
        exchange.reset() if how == "reset" else exchange.writer.close()

    async with Server(handler).listening() as server:
        where = endpoint(server.port)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        with pytest.raises(errors.Interrupted):
            await upstream.read_bounded(reply, 10_000)
        reply.close()


class Authority:
    """A certificate authority that our machine does not know."""

    def __init__(self, name: str = "127.0.0.1") -> None:
        self.ca = trustme.CA()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ca.issue_cert(name).configure_cert(self.context)

    @property
    def pem(self) -> str:
        return self.ca.cert_pem.bytes().decode()


async def test_r31_an_unknown_authority_is_a_tls_error(pools: connections.Pools) -> None:
    async with Server(quiet).listening(Authority().context) as server:
        where = endpoint(0, base_url=f"https://127.0.0.1:{server.port}/v1")
        with pytest.raises(errors.TlsError):
            await upstream.stream(pools, where, question(where), credential=credential(where))
        with pytest.raises(errors.TlsError):
            await ask(where, credential(where))
        assert server.exchanges == []


async def test_r31_the_providers_own_bundle_is_the_only_way_to_accept_it(pools: connections.Pools) -> None:
    authority = Authority()
    async with Server(quiet).listening(authority.context) as server:
        where = endpoint(0, base_url=f"https://127.0.0.1:{server.port}/v1", ca_pem=authority.pem)
        reply = await upstream.stream(pools, where, question(where), credential=credential(where))
        assert await upstream.read_bounded(reply, 100) == b'{"ok": true}'
        assert (await ask(where)).status == 200
        other = replace(where, ca_pem=Authority().pem)
        with pytest.raises(errors.TlsError):
            await upstream.stream(pools, other, question(other), credential=None)
        bare = replace(where, ca_pem="")
        with pytest.raises(errors.TlsError):
            await upstream.stream(pools, bare, question(bare), credential=None)


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_f16_a_large_answer_comes_in_portions_that_are_small_enough_to_keep(tls: bool) -> None:
    """On the loop that we serve with, which reads four times as much at once when it is left alone."""
    body = os.urandom(8 * 1024 * 1024)
    authority = Authority()

    async def largest() -> int:
        server = Server(lambda exchange: exchange.answer(body))
        context = authority.context if tls else None
        async with server.listening(context), connections.Pools() as pools:
            url = f"http{'s' if tls else ''}://127.0.0.1:{server.port}/v1"
            where = endpoint(0, base_url=url, ca_pem=authority.pem if tls else "")
            reply = await upstream.stream(pools, where, question(where), credential=None)
            parts = []
            while part := await reply.read():
                parts.append(part)
            reply.close()
        assert b"".join(parts) == body
        return max(map(len, parts))

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(largest()) <= http1.READ_BYTES + 2 * http1.READ_BUFFER


@pytest.mark.parametrize(
    "until_the_end", [False, True], ids=["its length is told", "it ends with the connection"]
)
def test_f04_an_answer_is_whole_though_its_provider_hangs_up_while_it_is_being_taken(
    until_the_end: bool,
) -> None:
    """On the loop that we serve with, which forgets at the end of a connection what it has not decrypted yet."""
    body = os.urandom(900_000)
    authority = Authority()
    length = b"" if until_the_end else b"Content-Length: %d\r\n" % len(body)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection = listener.accept()[0]
            except OSError:
                return
            with (
                contextlib.suppress(OSError),
                authority.context.wrap_socket(connection, server_side=True) as tls,
            ):
                asked = b""
                while not asked.endswith(b"}"):
                    asked += tls.recv(65536)
                tls.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n%b\r\n" % length + body)

    async def taken() -> list[bytes]:
        where = endpoint(0, base_url=f"https://127.0.0.1:{port}/v1", ca_pem=authority.pem)
        found = []
        async with connections.Pools() as pools:
            for pause in (0.0, 0.02) * 4:
                reply = await upstream.stream(pools, where, question(where), credential=None)
                parts = []
                while part := await reply.read():
                    parts.append(part)
                    await asyncio.sleep(pause)
                found.append(b"".join(parts))
        return found

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            assert [each == body for each in runner.run(taken())] == [True] * 8


async def test_r31_a_certificate_of_another_host_is_a_tls_error(pools: connections.Pools) -> None:
    authority = Authority("other.example")
    async with Server(quiet).listening(authority.context) as server:
        where = endpoint(0, base_url=f"https://127.0.0.1:{server.port}/v1", ca_pem=authority.pem)
        with pytest.raises(errors.TlsError):
            await upstream.stream(pools, where, question(where), credential=None)
        with pytest.raises(errors.TlsError):
            await ask(where)


async def test_r31_an_unreadable_bundle_is_a_tls_error(pools: connections.Pools) -> None:
    where = endpoint(1, base_url="https://127.0.0.1:1/v1", ca_pem="-----BEGIN CERTIFICATE-----\nx\n")
    with pytest.raises(errors.TlsError):
        await upstream.stream(pools, where, question(where), credential=None)
    with pytest.raises(errors.TlsError):
        await ask(where)


async def test_f11_a_server_that_speaks_no_tls_is_a_tls_error(pools: connections.Pools) -> None:
    async def plain(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read(1000)
        writer.close()

    server = await asyncio.start_server(plain, "127.0.0.1", 0)
    where = endpoint(0, base_url=f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
    with pytest.raises(errors.TlsError):
        await upstream.stream(pools, where, question(where), credential=None)
    with pytest.raises(errors.TlsError):
        await ask(where)
    server.close()


async def test_the_name_is_kept_for_host_and_sni_when_the_checked_address_is_dialled(
    names: dict[str, list[str]], pools: connections.Pools
) -> None:
    names["gpu.example"] = ["127.0.0.1"]
    authority = Authority("gpu.example")
    asked_for: list[str | None] = []
    authority.context.sni_callback = lambda _socket, name, _context: asked_for.append(name)
    async with Server(quiet).listening(authority.context) as server:
        where = endpoint(0, base_url=f"https://gpu.example:{server.port}/v1", ca_pem=authority.pem)
        reply = await upstream.stream(pools, where, question(where), credential=None)
        reply.close()
        await ask(where)
        assert asked_for == ["gpu.example", "gpu.example"]
        assert {exchange.headers["host"] for exchange in server.exchanges} == {f"gpu.example:{server.port}"}


async def test_plain_http_to_a_public_address_is_refused(
    names: dict[str, list[str]], pools: connections.Pools
) -> None:
    names["public.example"] = ["192.31.196.1"]
    where = endpoint(0, base_url="http://public.example/v1")
    with pytest.raises(errors.DestinationNotAllowed):
        await upstream.stream(pools, where, question(where), credential=None)


async def test_r02_a_sealed_key_opens_for_no_other_row_and_no_other_origin(pools: connections.Pools) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(server.port)
        moved = credential(replace(where, base_url="https://api.example.com/v1"))
        stolen = replace(credential(where), uid="another-row")
        broken = replace(credential(where), stored=credential(where).stored[:-4] + "AAAA")
        for key in (moved, stolen, broken, replace(moved, stored=""), replace(moved, stored=SECRET)):
            with pytest.raises(errors.CredentialUnavailable):
                await upstream.stream(pools, where, question(where), credential=key)
        assert server.connections == 0


async def test_a_request_to_another_origin_than_its_provider_is_refused(pools: connections.Pools) -> None:
    async with Server(quiet).listening() as server:
        where = endpoint(1)
        request = WireRequest("GET", f"http://127.0.0.1:{server.port}/v1/models")
        with pytest.raises(errors.DestinationNotAllowed):
            await upstream.stream(pools, where, request, credential=credential(where))
        assert server.connections == 0


async def test_a_vendor_is_not_dialled_without_a_key(pools: connections.Pools) -> None:
    where = endpoint(1, kind="openai", base_url="https://api.openai.com/v1")
    with pytest.raises(errors.CredentialUnavailable):
        await upstream.stream(pools, where, question(where), credential=None)


async def value_of(reference: str) -> str:
    where = endpoint(1)
    return (await upstream.open_secret(credential(where, reference), origin=where.origin)).reveal()


async def test_a_reference_names_an_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEAM_MODEL_KEY", "sk-from-env\n")
    assert await value_of("env://TEAM_MODEL_KEY") == "sk-from-env"


@pytest.mark.parametrize(
    "name",
    [
        "SECRET_KEY", "PENSTOCK_ENCRYPTION_KEY", "PENSTOCK_PEPPERS", "JWT_SIGNING_KEY", "DATABASE_URL", "REDIS_URL", "OIDC_CLIENT_SECRET",
        "VAULT_TOKEN", "OP_TOKEN", "SENTRY_DSN", "DJANGO_SUPERUSER_PASSWORD", "METRICS_TOKEN", "SECRET_KEY_FILE", "PGPASSWORD", "secret_key",
        "NOT_SET_ANYWHERE", "", "A-B", "1A", "A B", "A=B",
    ],
)  # fmt: skip
async def test_a_reference_never_reads_our_own_settings_or_what_is_not_there(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name and name.replace("_", "").isalnum() and name != "NOT_SET_ANYWHERE":
        monkeypatch.setenv(name, "something-secret")
    with pytest.raises(errors.CredentialUnavailable):
        await value_of(f"env://{name}")


async def test_a_reference_names_a_file(tmp_path: Path) -> None:
    (tmp_path / "my key").write_text("sk-from-file\n")
    assert await value_of(f"file://{tmp_path}/my%20key") == "sk-from-file"


async def test_a_file_that_is_no_small_text_of_one_line_is_refused(tmp_path: Path, settings: Any) -> None:
    (tmp_path / "big").write_bytes(b"x" * 70_000)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "lines").write_text("one\ntwo\n")
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    (settings.DATA_DIR / "db").write_text("ours")
    (tmp_path / "link").symlink_to(settings.DATA_DIR / "db")
    for name in (
        "big",
        "binary",
        "lines",
        "empty",
        "folder",
        "pipe",
        "missing",
        "data/db",
        "link",
        "data/../data/db",
    ):
        with pytest.raises(errors.CredentialUnavailable):
            await asyncio.wait_for(value_of(f"file://{tmp_path}/{name}"), 2)
    for path in ("/proc/self/environ", "/dev/zero", "relative", "", "host/etc/hostname", "/etc/host\0name"):
        with pytest.raises(errors.CredentialUnavailable):
            await value_of(f"file://{path}")


@pytest.mark.parametrize("reference", ["vault://kv/llm#key", "op://vault/item/field"])
async def test_a_store_that_is_not_built_yet_says_so(reference: str) -> None:
    with pytest.raises(errors.CredentialUnavailable, match=r".*") as caught:
        await value_of(reference)
    assert "://" in caught.value.detail


async def test_the_echo_provider_streams_word_by_word_without_a_socket(pools: connections.Pools) -> None:
    where = endpoint(1, kind="echo", base_url=KINDS["echo"].base_url)
    reply = await upstream.stream(pools, where, question(where), credential=None)
    parts = []
    while part := await reply.read():
        parts.append(part)
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/event-stream"
    assert len(parts) == 5
    assert parts[-1] == b"data: [DONE]\n\n"
    reply.close()
    assert (await ask(where)).status == 200


async def test_pools_are_shared_by_none_but_the_same_policy_and_bundle(pools: connections.Pools) -> None:
    loose, strict = Policy(allow_private=True), Policy()
    assert pools.get(loose) is pools.get(Policy(allow_private=True))
    assert pools.get(loose) is not pools.get(strict)
    assert pools.get(loose) is not pools.get(loose, Authority().pem)
