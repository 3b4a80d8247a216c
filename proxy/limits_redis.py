"""The way from a process to the limits in Redis: one connection, and the breaker that gives Redis up for a while.

Operations are written as they come, together with whatever else the same turn of the event loop brought, and their replies
are read in that order: a burst costs one round trip and no task. Nothing read from Redis is trusted for anything but
counting: answers must be whole numbers, or bytes whose reader can tell that we wrote them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import cast

import hiredis
from redis.asyncio.connection import AbstractConnection, ConnectionPool

from proxy.limits_lua import HOLD, RELEASE, SCRIPTS, Script

logger = logging.getLogger(__name__)

TIMEOUT = 0.05
"""Seconds that Redis may be silent while something waits for it, connecting included."""
GRACE = 0.005
"""The end of TIMEOUT, begun again when the event loop was late: a busy process is not a silent Redis."""
ERRORS_IN_A_ROW = 5
REST_SECONDS = 0.5
"""At least, between two trials of a Redis that was given up. Less than a sweep, so that limits are shared again soon."""
LINGER = 0.01
"""Seconds that what nobody waits for may wait for company: a write wakes Redis up, which costs more than what it says."""

UNDELIVERED = 20_000

Word = str | int | float | bytes | memoryview
Words = tuple[Word, ...]


def _packed(words: Words) -> bytes:
    packed: bytes = hiredis.pack_command(words)  # type: ignore[arg-type]  # the stub says tuple[X], and means tuple[X, ...]
    return packed


class LinkFailed(Exception):
    """Redis did not do it, or not in time; it may still have been done."""


@dataclass(slots=True, eq=False)
class Operation:
    """`words` as sent. `again`: what is sent once Redis is back, if it was not done; only what may be done twice.

    since: when it was handed to the connection, in the loop's time. resent: it went out on a second connection.
    """

    words: Words
    script: Script | None = None
    again: Words | None = None
    answer: asyncio.Future[object] | None = None
    since: float = 0.0
    resent: bool = False


def call(script: Script, *keys: str, words: Words) -> Operation:
    return Operation(("EVALSHA", script.digest, len(keys), *keys, *words), script)


class Wire(asyncio.Protocol):
    """An open connection: operations that were written, in order, and the parser that reads their replies."""

    def __init__(self, writer: asyncio.StreamWriter, link: Link) -> None:
        self._writer = writer  # Kept: it closes its transport when nobody does any more.
        self._transport = cast(asyncio.Transport, writer.transport)
        self._transport.set_protocol(self)
        self._link = link
        self._reader = hiredis.Reader()
        self.sent: deque[Operation] = deque()
        self.write([Operation(("SCRIPT", "LOAD", script.source)) for script in SCRIPTS])

    def write(self, operations: Iterable[Operation]) -> None:
        self.sent.extend(operations)
        self._transport.write(b"".join([_packed(operation.words) for operation in operations]))

    def data_received(self, data: bytes) -> None:
        self._link.heard()
        self._reader.feed(data)
        try:
            while self.sent and (reply := self._reader.gets()) is not False:
                self._link.settle(self.sent.popleft(), reply)
        except hiredis.ProtocolError as error:
            self._link.lost(self, error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._link.lost(self, exc or ConnectionResetError())

    def abort(self) -> None:
        self._transport.abort()


class Link:
    """Redis as far as the limits use it. `open` is the breaker's state: while it is, nothing but a trial is sent."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.open = False
        self._url = url
        self._clock = clock
        self._errors = 0
        self._tried = 0.0
        self._asked = False
        self._heard = 0.0
        self._queue: list[Operation] = []
        self._undelivered: deque[Operation] = deque(maxlen=UNDELIVERED)
        self._wire: Wire | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._writing: asyncio.Handle | None = None
        self._lingering: asyncio.TimerHandle | None = None
        self._watch: asyncio.TimerHandle | None = None

    async def ask(self, operation: Operation) -> list[int]:
        """The numbers a script answers. Raises LinkFailed when Redis is silent for TIMEOUT."""
        self._asked = True
        reply = await self._do(operation)
        if isinstance(reply, list) and set(map(type, reply)) == {int}:
            return reply
        raise LinkFailed("not numbers")

    async def read(self, name: str, *, most: int) -> bytes:
        """The first `most` bytes under a name, nothing when there are none. Whoever asks makes sure that they are his."""
        reply = await self._do(Operation(("GETRANGE", name, 0, most - 1)))
        return reply if isinstance(reply, bytes) else b""

    def send(self, operation: Operation) -> None:
        """Have it done soon: with the next question, or after LINGER. Nobody waits for it.

        What is given back stands before what is asked next, so a caller never waits for its own earlier request.
        """
        if not self.open:
            self._queue.append(operation)
            if self._writing is None and self._lingering is None:
                self._lingering = asyncio.get_running_loop().call_later(LINGER, self._write)
        else:
            self._keep(operation)

    def send_undelivered(self) -> None:
        """Try again what may be done twice."""
        waiting, self._undelivered = self._undelivered, deque(maxlen=UNDELIVERED)
        for operation in waiting:
            self.send(operation)

    async def flush(self) -> None:
        """Wait until what was sent before has been answered. Being cancelled here stops nothing."""
        if self._queue or self._waiting:
            with contextlib.suppress(LinkFailed):
                await self._do(Operation(("PING",)))

    async def recover(self) -> bool:
        """Try an open breaker, at most every REST_SECONDS; whether Redis is back."""
        if self._clock() - self._tried < REST_SECONDS:
            return False
        self._tried = self._clock()
        try:
            await self._try()
        except LinkFailed:
            return False
        self._errors, self.open = 0, False
        logger.warning("Redis is back, and keeps the limits again")
        return True

    async def look(self) -> None:
        """Try Redis, unless a request has done so since the last look: that it is away is known before somebody needs it."""
        asked, self._asked = self._asked, False
        if not asked:
            with contextlib.suppress(LinkFailed):
                await self._try()

    async def _try(self) -> None:
        """A write, since a replica and a full server still read."""
        await self._do(Operation(("SET", "penstock:limit:probe", 1, "PX", 1000)))

    async def close(self) -> None:
        await self.flush()
        self._hang_up()

    # -- from here to Redis ------------------------------------------------------------------------------------------

    async def _do(self, operation: Operation) -> object:
        loop = asyncio.get_running_loop()
        operation.answer = loop.create_future()
        self._queue.append(operation)
        if self._writing is None:
            # At the end of this turn of the loop, so that all of its requests go out in one write.
            self._writing = loop.call_soon(self._write)
        return await operation.answer

    def _write(self) -> None:
        if self._lingering is not None:
            self._lingering.cancel()
        self._writing = self._lingering = None
        if not self._queue:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        for operation in self._queue:
            operation.since = operation.since or now
        if self._watch is None:
            self._watch = loop.call_later(TIMEOUT - GRACE, self._look)
        if self._wire is not None:
            self._wire.write(self._queue)
            self._queue = []
        elif self._connecting is None:
            self._connecting = loop.create_task(self._connect())

    async def _connect(self) -> None:
        """redis-py reads the address, opens the connection and signs in; from then on the wire has it."""
        pool = ConnectionPool.from_url(
            self._url, protocol=2, driver_info=None, socket_timeout=None, socket_connect_timeout=None
        )
        connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py has it without types
        try:
            await connection.connect()  # type: ignore[no-untyped-call]  # as above
        except Exception as error:  # noqa: BLE001  # whatever it is, requests go on without Redis
            self._connecting = None
            self._give_up(error)
            return
        except BaseException:
            await connection.disconnect(nowait=True)
            raise
        self._connecting = None
        # redis-py has no public way to hand over its stream, and reading through it costs a request twice as much.
        writer = cast(asyncio.StreamWriter, connection._writer)
        connection._reader = connection._writer = None
        self._wire = Wire(writer, self)
        self._write()

    # -- and back ----------------------------------------------------------------------------------------------------

    @property
    def _waiting(self) -> bool:
        return self._connecting is not None or bool(self._wire is not None and self._wire.sent)

    def heard(self) -> None:
        self._heard = asyncio.get_running_loop().time()

    def _look(self) -> None:
        """Once in TIMEOUT while something waits: has Redis been silent for so long?"""
        self._watch = None
        oldest = self._oldest()
        if oldest is None:
            return
        loop = asyncio.get_running_loop()
        left = max(oldest.since, self._heard) + TIMEOUT - GRACE - loop.time()
        if left > 0:
            self._watch = loop.call_later(left, self._look)
        else:
            # What has arrived meanwhile is read before this comes, however late the loop is.
            self._watch = loop.call_later(GRACE, self._judge, oldest)

    def _judge(self, oldest: Operation) -> None:
        self._watch = None
        if self._oldest() is oldest:
            self._give_up(TimeoutError())
        elif self._waiting:
            self._look()

    def _oldest(self) -> Operation | None:
        if self._wire is not None and self._wire.sent:
            # The scripts are loaded ahead of the first question, and nobody waits for them.
            return next((each for each in self._wire.sent if each.since), None)
        return self._queue[0] if self._connecting is not None and self._queue else None

    def lost(self, wire: Wire, error: Exception) -> None:
        """The connection is gone. It may have been idle, or the server was restarted: once more, on a new one."""
        if wire is not self._wire:
            return
        again = [each for each in wire.sent if each.since and _may_be_repeated(each)]
        self._wire = None
        wire.abort()
        if any(each.resent for each in again) or (again and self._heard > again[0].since):
            self._queue[:0] = again
            self._give_up(error)
            return
        for operation in again:
            operation.words, operation.resent = operation.again or operation.words, True
        self._queue[:0] = again
        self._write()

    def _give_up(self, error: Exception) -> None:
        """Fail everything that waits."""
        failed = [] if self._wire is None else [each for each in self._wire.sent if each.since]
        failed += self._queue
        self._queue = []
        self._hang_up()
        self._count_errors(max(1, sum(operation.answer is not None for operation in failed)), error)
        for operation in failed:
            self._fail(operation, error)

    def _hang_up(self) -> None:
        wire, self._wire = self._wire, None
        if wire is not None:
            wire.abort()
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._watch is not None:
            self._watch.cancel()
            self._watch = None

    def settle(self, operation: Operation, reply: object) -> None:
        """`reply` is what Redis says to `operation`; an error of its own is an exception here."""
        if isinstance(reply, Exception) and str(reply).startswith("NOSCRIPT") and operation.script:
            if operation.answer is None or not operation.answer.done():
                operation.words = ("EVAL", operation.script.source, *operation.words[2:])
                self._queue.append(operation)
                self._writing = self._writing or asyncio.get_running_loop().call_soon(self._write)
        elif isinstance(reply, Exception) and not str(reply).startswith("WRONGTYPE"):
            self._count_errors(int(operation.answer is not None), reply)
            self._fail(operation, reply)
        else:
            if _has_written(operation, reply):
                self._errors = 0
            if operation.answer is not None and not operation.answer.done():
                operation.answer.set_result(reply)

    def _count_errors(self, number: int, error: Exception) -> None:
        self._errors += number
        if self._errors >= ERRORS_IN_A_ROW and not self.open:
            self.open, self._tried = True, self._clock()
            logger.warning("Redis fails (%s), so each process keeps its share of the limits", _reason(error))

    def _fail(self, operation: Operation, error: Exception) -> None:
        self._keep(operation)
        if operation.answer is not None and not operation.answer.done():
            operation.answer.set_exception(LinkFailed(_reason(error)))

    def _keep(self, operation: Operation) -> None:
        if operation.again is not None:
            self._undelivered.append(Operation(operation.again, operation.script, operation.again))


def _may_be_repeated(operation: Operation) -> bool:
    """Counting too much is safe, giving back twice is not."""
    return operation.script is not RELEASE or operation.again is not None


def _has_written(operation: Operation, reply: object) -> bool:
    """Whether this proves that Redis takes writes: removing a member or refusing a request works on a full one, too."""
    if reply == b"OK":  # of a SET
        return True
    return isinstance(reply, list) and not (operation.script is HOLD and reply[:1] != [0])


def _reason(error: Exception) -> str:
    """A word for the log: its whole text could repeat an address with its password."""
    return type(error).__name__
