"""The connections to providers: what is sent, what of an answer is believed, and which connections serve again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator

import pytest
from multidict import CIMultiDict

from providers import client, connections, errors
from providers.connections import Dial, Pool
from providers.destination import Policy
from providers.http1 import Response
from tests.providers.test_upstream import Exchange, Server, quiet

pytestmark = pytest.mark.no_database


@pytest.fixture
async def pool() -> AsyncIterator[Pool]:
    made = Pool(Policy(allow_private=True, plain=True))
    yield made
    made.close()


async def ask(
    pool: Pool, server: Server, *, body: bytes | None = b"{}", headers: dict[str, str] | None = None
) -> Response:
    url = f"http://127.0.0.1:{server.port}/v1/chat"
    return await pool.request("POST", url, CIMultiDict(headers or {}), body, connect=2.0, dial=Dial())


async def whole(response: Response) -> bytes:
    parts = []
    while part := await response.read():
        parts.append(part)
    return b"".join(parts)


async def answered(pool: Pool, raw: bytes, *, close: bool = False) -> bytes:
    """The body of an answer that is sent just so."""

    async def handler(exchange: Exchange) -> None:
        await exchange.send(raw)
        if close:
            exchange.writer.close()

    async with Server(handler).listening() as server, asyncio.timeout(5):
        return await whole(await ask(pool, server))


async def test_the_head_of_a_request_says_who_asks_and_for_nothing_compressed(pool: Pool) -> None:
    async with Server(quiet).listening() as server:
        await whole(await ask(pool, server, headers={"Accept-Encoding": "gzip", "X-Team": "blå"}))
        await whole(await ask(pool, server, body=None, headers={"User-Agent": "mine"}))
        first, second = server.exchanges
        assert first.head.split(b"\r\n")[0] == b"POST /v1/chat HTTP/1.1"
        assert first.headers["host"] == f"127.0.0.1:{server.port}"
        assert first.headers["accept-encoding"] == "identity"
        assert first.headers["user-agent"] == client.USER_AGENT
        assert first.headers["x-team"] == "blå"
        assert first.headers["content-length"] == "2"
        assert second.headers["user-agent"] == "mine"
        assert "content-length" not in second.headers


@pytest.mark.parametrize("value", ["a\r\nX-Evil: b", "a\nb", "a\rb", "a\0b", "\u0100"])
async def test_r27_no_value_becomes_another_line(pool: Pool, value: str) -> None:
    async with Server(quiet).listening() as server:
        with pytest.raises(errors.HeaderNotAllowed):
            await ask(pool, server, headers={"X-Team": value})
        assert server.connections == 0


@pytest.mark.parametrize(
    ("url", "place", "lines"),
    [
        ("https://api.example.com/v1/chat?api-version=1", ("api.example.com", 443, True),
         "GET /v1/chat?api-version=1 HTTP/1.1\r\nHost: api.example.com"),
        ("http://[::1]:8000/v1", ("::1", 8000, False), "GET /v1 HTTP/1.1\r\nHost: [::1]:8000"),
        ("https://bücher.example:443", ("xn--bcher-kva.example", 443, True), "GET / HTTP/1.1\r\nHost: xn--bcher-kva.example"),
        ("http://box/ a%20b/ü", ("box", 80, False), "GET /%20a%20b/%C3%BC HTTP/1.1\r\nHost: box"),
    ],
)  # fmt: skip
def test_a_url_is_a_place_and_a_first_line(url: str, place: tuple[str, int, bool], lines: str) -> None:
    assert connections._start("GET", url) == (place, lines)


@pytest.mark.parametrize(
    "url",
    ["ftp://box/", "http://", "http://box:99999/", "box", "http://[::1/", f"http://{'a' * 70}.example/"],
)
def test_what_is_no_http_address_is_refused(url: str) -> None:
    with pytest.raises(errors.DestinationNotAllowed):
        connections._start("GET", url)


@pytest.mark.parametrize(
    ("raw", "close", "body"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", False, b"hello"),
        (b"HTTP/1.1 200 OK\r\nX-Empty:\r\nContent-Length: 0\r\n\r\n", False, b""),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nhe\r\n3\r\nllo\r\n0\r\nX-Sum: 1\r\n\r\n", False, b"hello"),
        (b"HTTP/1.1 200 OK\r\n\r\nhello", True, b"hello"),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", True, b"hello"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", False, b""),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\nhello", False, b"hello"),
    ],
    ids=["length", "empty", "chunked", "until-the-end", "http-1.0", "204", "close"],
)  # fmt: skip
async def test_each_way_to_end_a_body_is_known(pool: Pool, raw: bytes, close: bool, body: bytes) -> None:
    assert await answered(pool, raw, close=close) == body


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Length: 5\r\nContent-Length: 6\r\n", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\nContent-Length: 5\r\n", b"Content-Length: +5\r\n", b"Content-Length : 5\r\n",
        b"X: a\r\n folded\r\nContent-Length: 5\r\n", b"Content-Length: 5\n",
    ],
)  # fmt: skip
async def test_a_head_that_can_be_read_in_two_ways_is_refused(pool: Pool, head: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        await answered(pool, b"HTTP/1.1 200 OK\r\n" + head + b"\r\nhello")


@pytest.mark.parametrize(
    "flood",
    [
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX: " + b"x" * 10_000_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n5;" + b"x" * 10_000_000,
    ],
    ids=["head", "trailer", "extension"],
)
async def test_what_brings_no_body_is_read_for_a_moment_only(pool: Pool, flood: bytes) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(flood)
        await asyncio.sleep(30)

    async with Server(handler).listening() as server, asyncio.timeout(5):
        with pytest.raises((errors.ProtocolError, errors.Interrupted)):
            await whole(await ask(pool, server))


async def test_what_had_arrived_is_handed_out_before_it_is_told_that_the_connection_broke(pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\nhello")
        exchange.writer.close()

    async with Server(handler).listening() as server:
        response = await ask(pool, server)
        await server.closed.wait()
        await asyncio.sleep(0.05)
        assert await response.read() == b"hello"
        for _ in range(2):
            with pytest.raises(errors.Interrupted):
                await response.read()


async def test_a_connection_serves_again_unless_its_answer_said_otherwise(pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        last = len(server.exchanges) == 3
        await exchange.answer(b"hello", extra="Connection: close\r\n" if last else "")

    server = Server(handler)
    async with server.listening():
        for connections_so_far in (1, 1, 1, 2):
            assert await whole(await ask(pool, server)) == b"hello"
            assert server.connections == connections_so_far


async def test_a_connection_with_an_answer_that_nobody_read_whole_does_not_serve_again(pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"x" * 1_000_000)

    async with Server(handler).listening() as server:
        for _ in range(2):
            response = await ask(pool, server)
            await response.read()
            response.close()
            assert await response.read() == b""
        assert server.connections == 2


@pytest.mark.parametrize("when", ["at once", "later"])
async def test_a_connection_that_says_more_than_its_answer_does_not_serve_again(
    pool: Pool, when: str
) -> None:
    answer, more = (
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwrong",
    )

    async def handler(exchange: Exchange) -> None:
        if when == "at once":
            await exchange.send(answer + more)
        else:
            await exchange.send(answer)
            await asyncio.sleep(0.05)
            await exchange.send(more)

    async with Server(handler).listening() as server:
        assert await whole(await ask(pool, server)) == b"hello"
        await asyncio.wait_for(server.closed.wait(), 2)
        assert await whole(await ask(pool, server)) == b"hello"
        assert server.connections == 2


async def test_a_connection_that_nobody_needs_is_closed(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "KEEPALIVE", 0.05)
    async with Server(quiet).listening() as server:
        await whole(await ask(pool, server))
        await asyncio.wait_for(server.closed.wait(), 2)
        assert not pool._idle


async def test_requests_at_the_same_time_have_a_connection_each(pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.answer(exchange.body)

    async with Server(handler).listening() as server:
        for _ in range(2):
            responses = await asyncio.gather(*(ask(pool, server, body=b"%d" % n) for n in range(20)))
            assert [await whole(each) for each in responses] == [b"%d" % n for n in range(20)]
        assert server.connections == 20


async def test_a_large_request_waits_for_a_slow_reader_and_is_sent_whole(pool: Pool) -> None:
    body = b"0123456789abcdef" * 500_000

    async def handler(exchange: Exchange) -> None:
        await exchange.answer(b"%d" % len(exchange.body))

    async with Server(handler).listening() as server:
        response = await ask(pool, server, body=body)
        assert await whole(response) == b"%d" % len(body)
        assert server.exchanges[0].body == body
        assert await whole(await ask(pool, server)) == b"2"
        assert server.connections == 1


async def test_an_answer_that_comes_before_the_request_was_taken_is_the_answer(pool: Pool) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(2)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno")
        await writer.drain()
        gone.set_result(await reader.read(-1) != b"")  # Taken at last, so that nothing is reset.
        writer.close()

    gone: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
    listening = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1000)
    server = Server(quiet, port=listening.sockets[0].getsockname()[1])
    async with asyncio.timeout(5):
        await whole(await ask(pool, server))
        response = await ask(pool, server, body=b"x" * 64_000_000)
        assert response.status == 413
        assert await whole(response) == b"no"
        assert await gone, "the connection does not serve again"
    assert not any(pool._idle.values())
    listening.close()


async def test_who_stops_waiting_ends_the_connection(pool: Pool) -> None:
    async def silent(exchange: Exchange) -> None:
        """The next thing that is read is the end."""

    async with Server(silent).listening() as server:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await ask(pool, server)
        await asyncio.wait_for(server.closed.wait(), 2)


async def test_who_stops_waiting_when_the_answer_is_there_takes_the_connection_from_nobody(
    pool: Pool,
) -> None:
    """Its answer is whole, so the connection may carry another request before the first one's task goes on."""
    answer = asyncio.Event()

    async def handler(exchange: Exchange) -> None:
        if exchange is not server.exchanges[0]:
            await answer.wait()
        await exchange.answer(b"hello")

    server = Server(handler)
    async with server.listening(), asyncio.timeout(5):
        first = asyncio.create_task(ask(pool, server))
        while not pool._idle:
            await asyncio.sleep(0)
            assert not first.done()
        second = asyncio.create_task(ask(pool, server))
        first.cancel()
        await asyncio.wait([first])
        answer.set()
        assert await whole(await second) == b"hello"
        assert server.connections == 1


async def test_who_waits_when_the_gateway_stops_is_told(pool: Pool) -> None:
    async def handler(exchange: Exchange) -> None:
        await exchange.send(b"HTTP/1.1 200 OK\r\n\r\nhello")

    async with Server(handler).listening() as server, asyncio.timeout(5):
        response = await ask(pool, server)
        assert await response.read() == b"hello"
        waiting = asyncio.create_task(response.read())
        await asyncio.sleep(0)
        pool.close()
        with pytest.raises(errors.Interrupted):
            await waiting


async def test_f12_an_address_waits_for_no_name_server(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(*args: object, **options: object) -> None:
        raise AssertionError("looked up")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert await client.resolve("127.0.0.1", 80) == [(socket.AF_INET, "127.0.0.1")]
    assert await client.resolve("::1", 80) == [(socket.AF_INET6, "::1")]


async def test_a_name_is_looked_up_once_for_all_who_ask_and_again_when_it_was_not_known(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    known: list[str] = []
    real = socket.getaddrinfo

    def look_up(host: str, *args: object, **options: object) -> object:
        if host != "box.example":
            return real(host, *args, **options)  # type: ignore[arg-type]
        asked.append(host)
        if not known:
            raise socket.gaierror(socket.EAI_NONAME, "not known")
        return real(known[0], *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    async with Server(quiet).listening() as server:

        async def one() -> bytes:
            url = f"http://box.example:{server.port}/"
            return await whole(await pool.request("GET", url, CIMultiDict(), None, connect=2.0, dial=Dial()))

        with pytest.raises(OSError, match="not known"):
            await one()
        known.append("127.0.0.1")
        assert await asyncio.gather(*(one() for _ in range(10))) == [b'{"ok": true}'] * 10
    assert len(asked) == 2


async def test_a_name_whose_first_address_refuses_is_reached_at_its_next(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with Server(quiet).listening() as server:
        addresses: list[tuple[int, str]] = [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1")]

        async def look_up(host: str, port: int, **_options: object) -> list[tuple[int, str]]:
            return addresses

        monkeypatch.setattr(connections, "checked_addresses", look_up)
        url = f"http://box.example:{server.port}/"
        response = await pool.request("GET", url, CIMultiDict(), None, connect=2.0, dial=Dial())
        assert await whole(response) == b'{"ok": true}'
