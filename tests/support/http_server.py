"""A raw HTTP/1.1 server on asyncio that can break the protocol: no framework stands between a behaviour and the socket.

A `Behaviour` is an async function that gets an `Exchange` (one request and the connection it came on) and does what it
likes. When it returns, the connection is kept for the next request if the answer was complete, else closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import socket
import struct
import termios
import time
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import Any

from tests.support.ledger import Ledger, Record

Behaviour = Callable[["Exchange"], Awaitable[None]]
Choose = Callable[[Record], Behaviour]
Headers = Mapping[str, str]
FLUSH_TIMEOUT = 2.0
BLOCK = 64 * 1024
UNTIL_CLOSE = -1


class Connection(asyncio.Protocol):
    """One accepted connection: reads requests, runs the chosen behaviour for one after another, notices the peer leave."""

    def __init__(self, ledger: Ledger, choose: Choose, registry: set[Connection]) -> None:
        self.ledger = ledger
        self._registry = registry  # the connections that are not lost yet
        self._choose = choose
        self._received = bytearray()
        self._more = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self.record: Record | None = None
        self.left = False  # by the peer or by us

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._registry.add(self)
        self.number = self.ledger.count_connection(1)
        self._task = asyncio.get_running_loop().create_task(self._serve())

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._more.set()

    def eof_received(self) -> None:
        self._peer_left()

    def connection_lost(self, error: Exception | None) -> None:
        self._peer_left()
        self._registry.discard(self)
        self.ledger.count_connection(-1)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    async def write(self, data: bytes) -> None:
        """Hand bytes to the kernel, no faster than it takes them."""
        await self._writable.wait()
        if self.transport.is_closing():
            await asyncio.Event().wait()  # until the loss of the connection cancels this
        self.transport.write(data)
        if self.record is not None:
            self.record.bytes_sent += len(data)
        # A peer that reads as fast as we write would otherwise never let the loop notice that it left.
        await asyncio.sleep(0)

    async def flushed(self) -> None:
        """Wait until the peer's kernel has acknowledged all that was written (at most two seconds)."""
        deadline = time.monotonic() + FLUSH_TIMEOUT
        file = self.transport.get_extra_info("socket").fileno()
        while time.monotonic() < deadline and (
            self.transport.get_write_buffer_size() or _unacknowledged(file)
        ):
            await asyncio.sleep(0.001)

    def close(self, *, reset: bool = False) -> None:
        """End the connection: in order (FIN), or with a reset (RST), which drops what is not delivered yet."""
        self.left = True
        if self.record is not None and self.record.finished_at is None:
            self.record.finished_at = time.monotonic()
        self.ledger.touch()
        if reset:
            raw = self.transport.get_extra_info("socket")
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def _peer_left(self) -> None:
        if not self.left:
            self.left = True
            if self.record is not None and self.record.finished_at is None:
                self.record.closed_by_peer_at = time.monotonic()
                self.ledger.touch()
            self.transport.close()
        self._task.cancel()

    async def _serve(self) -> None:
        with contextlib.suppress(_Malformed):
            while not self.left:
                record = await self._read_request()
                exchange = Exchange(self, record)
                self.record = record
                await self._answer(exchange)
                record.finished_at = record.finished_at or time.monotonic()
                self.ledger.touch()
                self.record = None
                if not exchange.complete:
                    break
        if not self.left:
            self.close()

    async def _answer(self, exchange: Exchange) -> None:
        behaviour = self._choose(exchange.request)
        exchange.request.behaviour = getattr(behaviour, "__qualname__", repr(behaviour)).partition(
            ".<locals>"
        )[0]
        self.ledger.add(exchange.request)
        try:
            await behaviour(exchange)
        except Exception as error:
            # A mistake in a behaviour must fail the test that wrote it, not look like one more fault.
            self.ledger.errors.append(error)

    async def _read_request(self) -> Record:
        head = (await self._take_until(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        try:
            method, target, _ = head[0].split(" ")
            items = tuple(
                (name, value.strip()) for name, _, value in (line.partition(":") for line in head[1:])
            )
        except ValueError:
            raise _Malformed from None
        body = await self._read_body({name.lower(): value for name, value in items})
        path, _, query = target.partition("?")
        return Record(len(self.ledger), self.number, method, path, query, items, body, _parsed(body))

    async def _read_body(self, headers: Headers) -> bytes:
        if headers.get("expect", "").lower() == "100-continue":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if "chunked" not in headers.get("transfer-encoding", ""):
            return await self._take(int(headers.get("content-length", "0")))
        body = bytearray()
        while size := int(await self._take_until(b"\r\n"), 16):
            body += await self._take(size)
            await self._take(2)
        await self._take_until(b"\r\n")
        return bytes(body)

    async def _take_until(self, mark: bytes) -> bytes:
        while (end := self._received.find(mark)) < 0:
            await self._wait_for_more()
        return (await self._take(end + len(mark)))[:end]

    async def _take(self, size: int) -> bytes:
        while len(self._received) < size:
            await self._wait_for_more()
        data = bytes(self._received[:size])
        del self._received[:size]
        return data

    async def _wait_for_more(self) -> None:
        self._more.clear()
        await self._more.wait()


class Exchange:
    """One request and the means to answer it, or not. `complete` is true once a well-formed answer was sent in full."""

    def __init__(self, connection: Connection, record: Record) -> None:
        self._connection = connection
        self.request = record
        self.complete = False
        self._chunked = False
        self.cut = 0
        self.pause = 0.0

    @property
    def streamed(self) -> bool:
        """Whether the caller asked for a stream."""
        return isinstance(self.request.json, dict) and self.request.json.get("stream") is True

    async def send(self, data: bytes) -> None:
        """Send bytes as they are; cut into pieces of `cut` bytes, each in a write of its own, if `cut` is set."""
        for start in range(0, len(data), self.cut or BLOCK):
            await self._connection.write(data[start : start + (self.cut or BLOCK)])
            if self.cut:
                await asyncio.sleep(self.pause)

    async def head(
        self, status: int = 200, headers: Headers | None = None, *, length: int | None = None
    ) -> None:
        """Send the status line and the headers; the body follows in chunks, or has this length, or ends with the
        connection (UNTIL_CLOSE)."""
        self.request.status = status
        self._chunked = length is None
        framing = {"Content-Length": str(length)}
        if length is None:
            framing = {"Transfer-Encoding": "chunked"}
        elif length == UNTIL_CLOSE:
            framing = {"Connection": "close"}
        lines = [f"{name}: {value}" for name, value in {**framing, **(headers or {})}.items()]
        reason = HTTPStatus(status).phrase if status in HTTPStatus._value2member_map_ else "Unknown"
        await self.send("\r\n".join([f"HTTP/1.1 {status} {reason}", *lines, "", ""]).encode("latin-1"))

    async def body(self, data: bytes) -> None:
        """Send a piece of the body, framed as the head announced. An empty piece sends nothing."""
        if data:
            await self.send(b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else data)

    async def chunk(self, data: bytes) -> None:
        """Send a piece of the body that the ledger counts as a content chunk."""
        await self.body(data)
        self.request.chunks_sent += 1
        self._connection.ledger.touch()

    async def end(self) -> None:
        """End the body; the connection may carry the next request."""
        if self._chunked:
            await self.send(b"0\r\n\r\n")
        self.complete = True

    async def answer(self, status: int, body: bytes, headers: Headers | None = None) -> None:
        """Send a whole answer with its length."""
        await self.head(status, headers, length=len(body))
        await self.body(body)
        await self.end()

    async def silence(self) -> None:
        """Send nothing more, and wait for the caller to leave."""
        await asyncio.Event().wait()

    async def reset(self) -> None:
        """Break the connection with a reset, once all that was sent has arrived."""
        await self._connection.flushed()
        self._connection.close(reset=True)

    async def hang_up(self) -> None:
        """Close the connection in order, once all that was sent has arrived."""
        await self._connection.flushed()
        self._connection.close()


class _Malformed(Exception):
    """What came in is no HTTP request."""


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return None


def _unacknowledged(file: int) -> int:
    # TIOCOUTQ on a TCP socket (Linux): bytes in the send queue, sent but unacknowledged ones included.
    return int(struct.unpack("i", fcntl.ioctl(file, termios.TIOCOUTQ, b"\0\0\0\0"))[0]) if file >= 0 else 0
