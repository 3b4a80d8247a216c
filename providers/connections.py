"""HTTP/1.1 towards the providers (RFC 9112), on connections that lead where the policy allows and are kept for the next request.

Parsing is llhttp's, in its strict form. What an answer may make us keep is bounded: READ_BUFFER of its body, or MAX_HEAD of what
brings no body. Nothing is decompressed, followed, remembered or read from the environment. One address is asked in one way: no
proxies, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast
from urllib.parse import quote, urlsplit

import httptools
from aiohappyeyeballs import start_connection
from multidict import CIMultiDict

from providers import errors
from providers.client import USER_AGENT, checked_addresses, tls_context
from providers.destination import Policy, check_address
from providers.wire import DEFAULT_PORTS

DNS_TTL = 30
"""Seconds. A changed record is used within a minute (F12)."""
NEXT_ADDRESS = 0.25
"""Seconds after which a name's next address is tried beside the one that does not answer (RFC 8305)."""
KEEPALIVE = 30.0
"""Seconds that a connection without a request is kept."""
MAX_HEAD = 64 * 1024
"""Bytes in a row that bring nothing of a body: a head, trailers, or what is neither (F06)."""
MAX_HEADERS = 128
MAX_INFORMATIONAL = 16
"""1xx answers before the real one; more are a flood (F06)."""
READ_BYTES = 64 * 1024
"""Of an answer at most are read from a connection at once: the loop by itself takes a quarter of a megabyte (F16)."""
READ_BUFFER = 32 * 1024
"""From so many bytes on that wait to be taken, a connection is not read from."""
MAX_WRITE = 256 * 1024
"""Of a body at most are given to a connection at once: more would hold up the loop."""
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
"""That stand for themselves in a request's target."""


@dataclass(slots=True)
class Dial:
    """What the one who sends a request learns of it: since when there was a connection, in monotonic seconds."""

    connected: float | None = None


class Place(NamedTuple):
    """Where a connection leads."""

    host: str
    port: int
    tls: bool


class Response:
    """The head of an answer, and its body as it arrives: a `Reply`. What arrived before the connection broke is handed out first."""

    __slots__ = ("_connection", "_ended", "_error", "_parts", "_size", "_waiter", "headers", "status")

    def __init__(self, connection: Connection) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self._connection: Connection | None = connection
        self._parts: list[bytes] = []
        self._size = 0
        self._ended = False
        self._error: errors.ProviderError | None = None
        self._waiter: asyncio.Future[None] | None = None

    async def read(self) -> bytes:
        """Some bytes, as soon as there are any; `b""` at the clean end. Raises Interrupted when the connection broke."""
        while not self._parts:
            if self._error is not None:
                # A new one: raised, it holds this frame and with it us, who would hold it.
                raise errors.Interrupted(detail=self._error.detail)
            if self._ended:
                return b""
            await self.news()
        parts = self._parts
        data = parts[0] if len(parts) == 1 else b"".join(parts)
        self._parts, self._size = [], 0
        if self._connection is not None:
            self._connection.go_on()
        return data

    def close(self) -> None:
        """Idempotent and immediate: the connection is dropped unless the answer is complete."""
        self._parts, self._ended = [], True
        if self._connection is not None:
            self._connection.drop()
            self._connection = None

    @property
    def told(self) -> bool:
        """Whether there is a head, or will never be one."""
        return self.status != 0 or self._error is not None

    async def head(self) -> None:
        while self.status == 0:
            if self._error is not None:
                raise self._error
            await self.news()

    async def news(self) -> None:
        """Wait until something has changed: a head, some of a body, an end, room to write."""
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take(self, parts: list[bytes]) -> bool:
        """Keep these until they are read. Whether that is as much as may wait."""
        self._parts += parts
        self._size += sum(map(len, parts))
        return self._size >= READ_BUFFER

    def end(self, error: errors.ProviderError | None = None) -> None:
        """There will be no more of it."""
        self._connection = None
        self._error, self._ended = error, True
        self.wake()


class Connection(asyncio.BufferedProtocol):
    """One connection, which carries one request at a time.

    begun: whether anything came in answer to the present request. `portion` is one for all connections of a pool: what was read
    into it is parsed before anything else is read.
    """

    def __init__(self, pool: Pool, place: Place) -> None:
        self._pool, self._place = pool, place
        self._arrived: list[bytes] = []
        self.on_body = (
            self._arrived.append
        )  # A stream has one for each token, so nothing more is done about each.
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport
        self._response: Response | None = None
        self._headers: CIMultiDict[str] = CIMultiDict()
        self._informational = self._barren = 0
        self._sent = self._complete = self._keep = self._held = self._choked = False
        self.begun = False
        self.idle_since = 0.0

    async def ask(self, head: bytes, body: bytes) -> Response:
        """Send a request and wait for the head of its answer. Raises ConnectFailed when the connection ends before it, and
        ProtocolError when what comes is no HTTP. Whoever stops waiting drops the connection."""
        response = self._response = Response(self)
        self.begun = self._complete = self._sent = False
        self._informational = self._barren = 0
        try:
            self._sent = await self._send(response, head, body)
            await response.head()
        except BaseException:
            # And not `drop`: after a whole answer the connection may carry another request by now.
            response.close()
            raise
        return response

    async def _send(self, response: Response, head: bytes, body: bytes) -> bool:
        """Whether all of it was sent: an answer that comes before that is answer enough."""
        if len(body) <= MAX_WRITE:
            self._transport.writelines((head, body))
            return True
        self._transport.write(head)
        rest = memoryview(body)
        while rest:
            while self._choked and not response.told:
                await response.news()
            if response.told:
                return False
            self._transport.write(rest[:MAX_WRITE])
            rest = rest[MAX_WRITE:]
        return True

    def go_on(self) -> None:
        """Read again, if that was put off."""
        if self._held:
            self._held = False
            self._transport.resume_reading()

    def drop(self, error: errors.ProviderError | None = None) -> None:
        """End it at once, whatever is on its way; error: told to whoever waits for that."""
        response, self._response = self._response, None
        self._transport.abort()
        if response is not None and error is not None:
            response.end(error)

    @property
    def closing(self) -> bool:
        return self._transport.is_closing()

    # What the loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if transport.get_extra_info("sslcontext") is not None:
            # Of what is not decrypted yet, no more is kept either.
            cast(Any, transport).set_read_buffer_limits(high=READ_BYTES)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._pool.portion

    def buffer_updated(self, nbytes: int) -> None:
        response = self._response
        if response is None:
            self._transport.abort()  # Nobody has asked.
            return
        self.begun = True
        self._barren += nbytes
        try:
            self._parser.feed_data(self._pool.portion[:nbytes])
            if self._barren > MAX_HEAD and not self._arrived:
                raise errors.ProtocolError(detail=f"{MAX_HEAD} bytes without anything of an answer")
        except (httptools.HttpParserError, httptools.HttpParserUpgrade, errors.ProtocolError) as error:
            self._broken(response, error)
        else:
            self._fed(response)

    def _fed(self, response: Response) -> None:
        full = self._hand_over(response)
        if self._complete:
            self._finish(response)
        elif full and not self._held:
            self._held = True
            self._transport.pause_reading()
        response.wake()

    def _hand_over(self, response: Response) -> bool:
        if not self._arrived:
            return False
        self._barren = 0
        full = response.take(self._arrived)
        self._arrived.clear()
        return full

    def _finish(self, response: Response) -> None:
        self._response = None
        response.end()
        self.go_on()
        if self._keep and self._sent:
            self._pool.put(self._place, self)
        else:
            self._transport.abort()

    def _broken(self, response: Response, error: Exception) -> None:
        """What came is no HTTP. An answer that was complete before that stays one."""
        self._hand_over(response)
        self.drop()
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else error
        detail = cause.detail if isinstance(cause, errors.ProviderError) else f"no HTTP: {cause}"
        if self._complete:
            response.end()
        elif response.status:
            response.end(errors.Interrupted(detail=detail))
        else:
            response.end(errors.ProtocolError(detail=detail))

    def pause_writing(self) -> None:
        self._choked = True

    def resume_writing(self) -> None:
        self._choked = False
        if self._response is not None:
            self._response.wake()

    def eof_received(self) -> bool:
        return False  # The other side is done, and so are we.

    def connection_lost(self, exc: Exception | None) -> None:
        self._pool.forget(self)
        del self._parser  # It refers to us: no cycle to collect.
        response, self._response = self._response, None
        if response is None:
            return
        if response.status == 0:
            response.end(
                errors.ConnectFailed(detail=f"the connection ended before an answer came: {exc or 'closed'}")
            )
        elif exc is None and _until_the_end(response.headers):
            response.end()
        else:
            response.end(
                errors.Interrupted(detail=f"the connection ended within an answer: {exc or 'closed'}")
            )

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self._complete:
            raise errors.ProtocolError(detail="more than one answer")
        self._headers = CIMultiDict()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers.add(name.decode("latin-1"), value.decode("latin-1"))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        response = self._response
        assert response is not None
        if len(self._headers) > MAX_HEADERS:
            raise errors.ProtocolError(detail=f"more than {MAX_HEADERS} headers")
        if status >= 200:
            # Trailers, which nobody asked for, come into a dictionary that nobody reads.
            response.status, response.headers, self._headers = status, self._headers, CIMultiDict()
            return
        self._informational += 1
        if status == 101 or status < 100:
            raise errors.ProtocolError(detail=f"HTTP {status} is no answer")
        if self._informational > MAX_INFORMATIONAL:
            raise errors.ProtocolError(detail="a flood of 1xx answers")

    def on_message_complete(self) -> None:
        assert self._response is not None
        if self._response.status:
            self._complete, self._keep = True, self._parser.should_keep_alive()


class Pool:
    """The connections of one policy and one CA bundle, on one event loop. Whoever makes it closes it."""

    def __init__(self, policy: Policy, ca_pem: str = "") -> None:
        self._policy, self._tls = policy, tls_context(ca_pem)
        self._idle: dict[Place, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._look_ups: dict[tuple[str, int], asyncio.Task[list[tuple[int, str]]]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self.portion = memoryview(bytearray(READ_BYTES))

    async def request(
        self,
        method: str,
        url: str,
        headers: CIMultiDict[str],
        body: bytes | None,
        *,
        connect: float,
        dial: Dial,
    ) -> Response:
        """Send a request, with `connect` seconds for a connection, and wait for the head of its answer.

        Twice when a connection from the pool turns out to be closed before one byte of an answer came (F13). Raises from
        `providers.errors`, OSError, ssl.SSLError, or TimeoutError when there is no connection in time.
        """
        place, start = _start(method, url)
        head = _head(start, headers, body)
        if (connection := self._take(place)) is not None:
            dial.connected = time.monotonic()
            try:
                return await connection.ask(head, body or b"")
            except errors.ConnectFailed:
                if connection.begun:
                    raise
        async with asyncio.timeout(connect):
            connection = await self._connect(place)
        dial.connected = time.monotonic()
        return await connection.ask(head, body or b"")

    def _take(self, place: Place) -> Connection | None:
        """The one that was used last, which is the least likely to be closed."""
        idle = self._idle.get(place)
        while idle:
            connection = idle.pop()
            if not connection.closing:
                return connection
        return None

    def put(self, place: Place, connection: Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.setdefault(place, []).append(connection)
        self._sweep_later()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)

    def _sweep_later(self) -> None:
        if self._sweep is None and self._idle:
            self._sweep = asyncio.get_running_loop().call_later(KEEPALIVE, self._sweep_up)

    def _sweep_up(self) -> None:
        """Close what has been idle for too long."""
        before = asyncio.get_running_loop().time() - KEEPALIVE
        self._sweep = None
        for place, connections in list(self._idle.items()):
            for each in connections:
                if each.idle_since <= before:
                    each.drop()
            if left := [each for each in connections if not each.closing]:
                self._idle[place] = left
            else:
                del self._idle[place]
        self._sweep_later()

    async def _connect(self, place: Place) -> Connection:
        loop = asyncio.get_running_loop()
        dialled = await start_connection(
            [
                (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, place.port))
                for family, address in await self._addresses(place.host, place.port)
            ],
            happy_eyeballs_delay=NEXT_ADDRESS,
            interleave=1,
            socket_factory=functools.partial(_checked_socket, self._policy),
        )
        _, connection = await loop.create_connection(
            functools.partial(Connection, self, place),
            sock=dialled,
            ssl=self._tls if place.tls else None,
            server_hostname=place.host if place.tls else None,
        )
        self._all.add(connection)
        return connection

    async def _addresses(self, host: str, port: int) -> list[tuple[int, str]]:
        """One question for all who want to know, whose answer is good for DNS_TTL."""
        if (literal := _literal(host)) is not None:
            return [literal]
        look_up = self._look_ups.get((host, port))
        if look_up is None:
            look_up = asyncio.create_task(checked_addresses(host, port, policy=self._policy))
            self._look_ups[host, port] = look_up
            look_up.add_done_callback(functools.partial(self._looked_up, (host, port)))
        return await asyncio.shield(look_up)

    def _looked_up(self, name: tuple[str, int], look_up: asyncio.Task[list[tuple[int, str]]]) -> None:
        if look_up.cancelled() or look_up.exception() is not None:
            self._look_ups.pop(name, None)
        else:
            look_up.get_loop().call_later(DNS_TTL, self._look_ups.pop, name, None)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for look_up in self._look_ups.values():
            look_up.cancel()
        for connection in list(self._all):
            connection.drop(errors.Interrupted(detail="the gateway stops"))
        self._idle.clear()


class Pools:
    """The data plane's pools of one event loop, one for each (policy, CA): no connection is shared by two policies."""

    def __init__(self) -> None:
        self._pools: dict[tuple[Policy, str], Pool] = {}

    def get(self, policy: Policy, ca_pem: str = "") -> Pool:
        pool = self._pools.get((policy, ca_pem))
        if pool is None:
            pool = self._pools[policy, ca_pem] = Pool(policy, ca_pem)
        return pool

    async def close(self) -> None:
        pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()
        await asyncio.sleep(0)  # What was dropped is closed in the loop's next turn.

    async def __aenter__(self) -> Pools:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()


@functools.lru_cache(maxsize=1024)
def _start(method: str, url: str) -> tuple[Place, str]:
    """Where a request goes, and its first lines. Raises DestinationNotAllowed for what is no http URL."""
    try:
        parts = urlsplit(url)
        host = (
            (parts.hostname or "").encode("idna").decode()
            if not _literal(parts.hostname or "")
            else parts.hostname
        )
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise errors.DestinationNotAllowed(detail="the request leads to no http address") from error
    if not host:
        raise errors.DestinationNotAllowed(detail="the request leads to no host")
    target = quote(f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", safe=URL_CHARACTERS)
    shown = f"[{host}]" if ":" in host else host
    if port != DEFAULT_PORTS[parts.scheme]:
        shown = f"{shown}:{port}"
    return Place(host, port, parts.scheme == "https"), f"{method} {target} HTTP/1.1\r\nHost: {shown}"


def _head(start: str, headers: CIMultiDict[str], body: bytes | None) -> bytes:
    """The head of a request. Raises HeaderNotAllowed for what would be more lines than it is headers (R27)."""
    headers.setdefault("User-Agent", USER_AGENT)
    headers.setdefault("Accept", "*/*")
    headers["Accept-Encoding"] = "identity"
    if body is not None:
        headers["Content-Length"] = str(len(body))
    lines = [start, *[f"{name}: {value}" for name, value in headers.items()], "", ""]
    head = "\r\n".join(lines)
    if head.count("\n") != len(headers) + 3 or head.count("\r") != len(headers) + 3 or "\0" in head:
        raise errors.HeaderNotAllowed(detail="a header of more than one line")
    try:
        return head.encode("latin-1")
    except UnicodeEncodeError as error:
        raise errors.HeaderNotAllowed(detail="a header that is not Latin-1") from error


def _literal(host: str) -> tuple[int, str] | None:
    """Family and address, if `host` is one and no name."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    return (socket.AF_INET if address.version == 4 else socket.AF_INET6), host


def _checked_socket(policy: Policy, address_info: tuple[Any, ...]) -> socket.socket:
    """It sees the address that is about to be dialled, whatever was looked up before."""
    family, kind, protocol, _, address = address_info
    check_address(str(address[0]), int(address[1]), policy=policy)
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def _until_the_end(headers: Mapping[str, str]) -> bool:
    """Whether a body ends with its connection, and not before."""
    return "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower()
