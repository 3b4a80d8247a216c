"""One HTTP/1.1 connection to a provider (RFC 9112), and the answers that come over it.

Parsing is llhttp's, in its strict form. What an answer may make us keep is bounded: READ_BUFFER of its body, or MAX_HEAD of what
brings no body. Nothing is decompressed, followed or remembered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, cast

import httptools
from multidict import CIMultiDict

from providers import errors

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


class Place(NamedTuple):
    """Where a connection leads."""

    host: str
    port: int
    tls: bool


class Keeper(Protocol):
    """Whose the connection is. portion: READ_BYTES of room, for all connections of a loop: what was read into it is parsed before
    anything else is read."""

    portion: memoryview

    def put(self, place: Place, connection: Connection) -> None:
        """It is free for another request."""
        ...

    def forget(self, connection: Connection) -> None:
        """It has ended."""
        ...


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

    begun: whether anything came in answer to the present request.
    """

    def __init__(self, keeper: Keeper, place: Place) -> None:
        self._keeper, self._place = keeper, place
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
            # While anything waits to be decrypted, nothing more is read, and the end is not seen either: uvloop drops at the end
            # of a connection what waits then, and an answer without a length would pass for whole.
            cast(Any, transport).set_read_buffer_limits(high=1)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._keeper.portion

    def buffer_updated(self, nbytes: int) -> None:
        response = self._response
        if response is None:
            self._transport.abort()  # Nobody has asked.
            return
        self.begun = True
        self._barren += nbytes
        try:
            self._parser.feed_data(self._keeper.portion[:nbytes])
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
            self._keeper.put(self._place, self)
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
        self._keeper.forget(self)
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


def _until_the_end(headers: Mapping[str, str]) -> bool:
    """Whether a body ends with its connection, and not before."""
    return "Content-Length" not in headers and "chunked" not in headers.get("Transfer-Encoding", "").lower()
