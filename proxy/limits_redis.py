"""The way from a process to the limits in Redis: one connection, and the breaker that gives Redis up for a while.

Operations that wait are sent together in one write, so a burst costs one round trip, keeps its order, and needs no more
than one connection. Nothing read from Redis is trusted for anything but counting: answers must be whole numbers.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from hiredis import pack_command
from redis.asyncio.connection import AbstractConnection, ConnectionPool
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, ResponseError

from proxy.limits_lua import HOLD, SCRIPTS, Script

logger = logging.getLogger(__name__)

TIMEOUT = 0.05
"""Seconds for a round trip, connecting included."""
GRACE = 0.005
"""The end of TIMEOUT, begun again when the event loop was late: a busy process is not a silent Redis."""
ERRORS_IN_A_ROW = 5
REST_SECONDS = 5.0
LINGER = 0.01
"""Seconds that what nobody waits for may wait for company: a write wakes Redis up, which costs more than what it says."""

BATCH = 512
UNDELIVERED = 20_000

Word = str | int | float | bytes | memoryview
Words = tuple[Word, ...]


def _packed(words: Words) -> bytes:
    packed: bytes = pack_command(words)  # type: ignore[arg-type]  # the stub says tuple[X], and means tuple[X, ...]
    return packed


_LOADS = b"".join([_packed(("SCRIPT", "LOAD", script.source)) for script in SCRIPTS])


class LinkFailed(Exception):
    """Redis did not do it, or not in time; it may still have been done."""


@dataclass(slots=True, eq=False)
class Operation:
    """`words` as sent. `again`: sent again once Redis is back, if it was not done; only what may be done twice."""

    words: Words
    script: Script | None = None
    again: bool = False
    answer: asyncio.Future[object] | None = None


def call(script: Script, *keys: str, words: Words, again: bool = False) -> Operation:
    return Operation(("EVALSHA", script.digest, len(keys), *keys, *words), script, again)


class Link:
    """Redis as far as the limits use it. `open` is the breaker's state: while it is, nothing but a trial is sent."""

    def __init__(self, url: str, *, clock: Callable[[], float]) -> None:
        self.open = False
        self._url = url
        self._clock = clock
        self._errors = 0
        self._tried = 0.0
        self._queue: deque[Operation] = deque()
        self._undelivered: deque[Operation] = deque(maxlen=UNDELIVERED)
        self._connection: AbstractConnection | None = None
        self._sender: asyncio.Task[None] | None = None
        self._lingering: asyncio.TimerHandle | None = None

    async def ask(self, operation: Operation) -> list[int]:
        """The numbers a script answers. Raises LinkFailed after TIMEOUT at the latest, twice that behind a slow one."""
        reply = await self._do(operation)
        if isinstance(reply, list) and all(type(item) is int for item in reply):
            return reply
        raise LinkFailed("not numbers")

    def send(self, operation: Operation) -> None:
        """Have it done soon: with the next question, or after LINGER. Nobody waits for it.

        What is given back stands before what is asked next, so a caller never waits for its own earlier request.
        """
        if not self.open:
            self._queue.append(operation)
            if self._idle and self._lingering is None:
                self._lingering = asyncio.get_running_loop().call_later(LINGER, self._start)
        elif operation.again:
            self._undelivered.append(operation)

    def send_undelivered(self) -> None:
        """Try again what may be done twice."""
        waiting, self._undelivered = self._undelivered, deque(maxlen=UNDELIVERED)
        for operation in waiting:
            self.send(operation)

    async def flush(self) -> None:
        """Wait until what is queued was sent. Being cancelled here stops nothing."""
        if self._queue:
            self._start()
        if self._sender is not None and not self._sender.done():
            await asyncio.wait({self._sender})

    async def recover(self) -> bool:
        """Try an open breaker, at most every REST_SECONDS; whether Redis is back.

        The trial is a write, since a replica and a full server still read.
        """
        if self._clock() - self._tried < REST_SECONDS:
            return False
        self._tried = self._clock()
        try:
            await self._do(Operation(("SET", "penstock:limit:probe", 1, "PX", 1000)))
        except LinkFailed:
            return False
        self._errors, self.open = 0, False
        logger.warning("Redis is back, and keeps the limits again")
        return True

    async def close(self) -> None:
        await self.flush()
        if self._connection is not None:
            await self._connection.disconnect(nowait=True)
            self._connection = None

    async def _do(self, operation: Operation) -> object:
        operation.answer = asyncio.get_running_loop().create_future()
        self._enqueue(operation)
        return await operation.answer

    def _enqueue(self, operation: Operation) -> None:
        self._queue.append(operation)
        self._start()

    @property
    def _idle(self) -> bool:
        return self._sender is None or self._sender.done()

    def _start(self) -> None:
        """Begin to send what is queued, unless that is under way."""
        if self._lingering is not None:
            self._lingering.cancel()
            self._lingering = None
        if self._idle:
            self._sender = asyncio.get_running_loop().create_task(self._send_all())

    async def _send_all(self) -> None:
        while self._queue:
            batch = [self._queue.popleft() for _ in range(min(BATCH, len(self._queue)))]
            try:
                replies = await self._exchange(batch)
            except Exception as error:  # noqa: BLE001  # whatever it is, requests go on without Redis
                batch.extend(self._queue)
                self._queue.clear()
                self._count_errors(max(1, sum(operation.answer is not None for operation in batch)), error)
                for operation in batch:
                    self._fail(operation, error)
            else:
                for operation, reply in zip(batch, replies, strict=True):
                    self._settle(operation, reply)

    async def _exchange(self, batch: list[Operation]) -> list[object]:
        payload = b"".join([_packed(operation.words) for operation in batch])
        connection = self._connection = self._connection or _make_connection(self._url)
        replies: list[object] = []
        try:
            async with _deadline():
                if connection.is_connected:
                    try:
                        return await _round_trip(connection, payload, len(batch), replies)
                    except RedisConnectionError:
                        if replies:
                            raise
                        # Closed while it was idle, or the server was restarted: once more, on a new one.
                        await connection.disconnect(nowait=True)
                await connection.connect()  # type: ignore[no-untyped-call]  # redis-py has it without types
                await _round_trip(connection, _LOADS, len(SCRIPTS), [])
                return await _round_trip(connection, payload, len(batch), replies)
        except BaseException:
            await connection.disconnect(nowait=True)
            raise

    def _settle(self, operation: Operation, reply: object) -> None:
        if isinstance(reply, NoScriptError) and operation.script and operation.words[0] == "EVALSHA":
            if operation.answer is None or not operation.answer.done():
                operation.words = ("EVAL", operation.script.source, *operation.words[2:])
                self._queue.append(operation)
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
        if operation.again:
            self._undelivered.append(operation)
        if operation.answer is not None and not operation.answer.done():
            operation.answer.set_exception(LinkFailed(_reason(error)))


def _has_written(operation: Operation, reply: object) -> bool:
    """Whether this proves that Redis takes writes: removing a member or refusing a request works on a full one, too."""
    return isinstance(reply, list) and not (operation.script is HOLD and reply[:1] != [0])


def _make_connection(url: str) -> AbstractConnection:
    pool = ConnectionPool.from_url(
        url, protocol=2, driver_info=None, socket_timeout=None, socket_connect_timeout=None, max_connections=1
    )
    connection: AbstractConnection = pool.make_connection()  # type: ignore[no-untyped-call]  # redis-py has it without types
    return connection


async def _round_trip(
    connection: AbstractConnection, payload: bytes, count: int, into: list[object]
) -> list[object]:
    """Send, and read `count` replies `into` the list, error replies as exceptions."""
    await connection.send_packed_command(payload, check_health=False)
    for _ in range(count):
        try:
            into.append(await connection.read_response(disable_decoding=True))
        except ResponseError as error:
            into.append(error)
    return into


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    """TimeoutError after TIMEOUT, of which the last part only runs while the event loop does."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(None) as timeout:
        timer = loop.call_later(TIMEOUT - GRACE, lambda: timeout.reschedule(loop.time() + GRACE))
        try:
            yield
        finally:
            timer.cancel()


def _reason(error: Exception) -> str:
    """A word for the log: its whole text could repeat an address with its password."""
    return type(error).__name__
