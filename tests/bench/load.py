"""The load generator, a process of its own: `python -m tests.bench.load '{"port": ..., ...}'` prints a `Result` as JSON.

Raw asyncio, connections that stay open, one request at a time on each. It stops sending at the asked count or after the asked
seconds, whichever is first, and waits for the answers that are still on their way. Three ways to load:

* closed loop: each of `connections` callers sends its next request when it has its answer;
* open loop (`rate`): requests begin at even intervals, whether or not those before are answered;
* holding (`hold`): `count` streams are opened at once, a line `open` says that each has begun, and they stay open until the standard input ends.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
import time
from dataclasses import asdict, dataclass, field

import uvloop

HOST = "127.0.0.1"
ANSWER_TIMEOUT = 60.0
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
END = b"0\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Load:
    """What to send. prompt: bytes of the user's message. model: also says what the upstream does. rate: requests per second."""

    port: int
    model: str
    count: int
    seconds: float
    connections: int = 32
    prompt: int = 1024
    key: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    rate: float = 0.0
    hold: bool = False

    def request(self) -> bytes:
        stream = self.model != "plain"
        messages = [{"role": "user", "content": ("river " * (self.prompt // 6 + 1))[: self.prompt]}]
        options = {"stream_options": {"include_usage": True}} if stream else {}
        body = json.dumps({"model": self.model, "stream": stream, **options, "messages": messages}).encode()
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: {HOST}:{self.port}\r\nAuthorization: Bearer {self.key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        head += "".join(f"{name}: {value}\r\n" for name, value in self.headers.items()) + "\r\n"
        return head.encode() + body


@dataclass(slots=True)
class Result:
    """What came of it. failure: the beginning of the last failed answer. seconds: from the first request to the last
    answer. first_ms: from sending to the first byte of the answer's body, so of a stream to its first token."""

    done: int = 0
    failed: int = 0
    failure: str = ""
    seconds: float = 0.0
    first_p50_ms: float = 0.0
    first_p99_ms: float = 0.0


class Caller(asyncio.Protocol):
    """One connection. `answer` is the status and how long the body's first byte took, once the answer is complete."""

    _transport: asyncio.WriteTransport

    def __init__(self) -> None:
        self.answer: asyncio.Future[tuple[int, float]] | None = None
        self._first = 0.0

    @classmethod
    async def connected(cls, port: int) -> Caller:
        transport, caller = await asyncio.get_running_loop().create_connection(cls, HOST, port)
        caller._transport = transport
        return caller

    def ask(self, request: bytes) -> asyncio.Future[tuple[int, float]]:
        self.answer = asyncio.get_running_loop().create_future()
        self._head = b""
        self._expected = (
            -1
        )  # bytes of the body still to come; -1: the body is chunked, or the head is not complete
        self._tail = b""
        self._first = 0.0
        self._status = 0
        self._sent = time.perf_counter()
        self._transport.write(request)
        return self.answer

    def data_received(self, data: bytes) -> None:
        if not self._status:
            self._head += data
            head, separator, data = self._head.partition(b"\r\n\r\n")
            if not separator:
                return
            self._status = int(head[9:12])
            length = LENGTH.search(head)
            self._expected = int(length[1]) if length else -1
        if data and not self._first:
            self._first = time.perf_counter() - self._sent
        if self._expected >= 0:
            self._expected -= len(data)
            complete = self._expected == 0
        else:
            self._tail = (self._tail + data)[-len(END) :]
            complete = self._tail == END
        if complete and self.answer is not None and not self.answer.done():
            self.answer.set_result((self._status, self._first))

    def connection_lost(self, error: Exception | None) -> None:
        if self.answer is not None and not self.answer.done():
            self.answer.set_exception(error or ConnectionResetError())

    @property
    def begun(self) -> bool:
        """Whether the answer's body has begun."""
        return self._first > 0

    @property
    def beginning(self) -> str:
        """Of the answer, head and all, as far as it came in the first piece."""
        return self._head.decode("latin-1")[:600]

    def close(self) -> None:
        if self.answer is not None:
            self.answer.cancel()
        self._transport.close()


@dataclass(slots=True)
class Run:
    """One load being applied by all its callers."""

    load: Load
    started: int = 0
    result: Result = field(default_factory=Result)
    firsts: list[float] = field(default_factory=list)

    async def apply(self) -> Result:
        began = time.perf_counter()
        deadline = began + self.load.seconds
        request = self.load.request()
        if self.load.rate:
            await self._arrive(request, began)
        else:
            await asyncio.gather(*(self._call(request, deadline) for _ in range(self.load.connections)))
        self.result.seconds = time.perf_counter() - began
        ordered = sorted(self.firsts) or [0.0]
        self.result.first_p50_ms = ordered[len(ordered) // 2] * 1000
        self.result.first_p99_ms = ordered[len(ordered) * 99 // 100] * 1000
        return self.result

    async def _call(self, request: bytes, deadline: float) -> None:
        caller = await Caller.connected(self.load.port)
        while self.started < self.load.count and time.perf_counter() < deadline:
            self.started += 1
            if not await self._ask(caller, request):
                caller.close()
                caller = await Caller.connected(self.load.port)
        caller.close()

    async def _arrive(self, request: bytes, began: float) -> None:
        """Begin `count` requests at even intervals; a connection that is free again is used again."""
        free: list[Caller] = []
        async with asyncio.TaskGroup() as answers:
            for number in range(self.load.count):
                await asyncio.sleep(began + number / self.load.rate - time.perf_counter())
                answers.create_task(self._borrow(free, request))
        for caller in free:
            caller.close()

    async def _borrow(self, free: list[Caller], request: bytes) -> None:
        caller = free.pop() if free else await Caller.connected(self.load.port)
        if await self._ask(caller, request):
            free.append(caller)
        else:
            caller.close()

    async def _ask(self, caller: Caller, request: bytes) -> bool:
        """Send one request and note its answer; whether the connection can be used again."""
        try:
            status, first = await asyncio.wait_for(caller.ask(request), ANSWER_TIMEOUT)
        except (OSError, TimeoutError) as error:
            self.result.failed += 1
            self.result.failure = repr(error)
            return False
        self.firsts.append(first)
        if status == 200:
            self.result.done += 1
        else:
            self.result.failed += 1
            self.result.failure = caller.beginning
        return True


async def hold(load: Load) -> None:
    """Open the streams, say `open` when each has begun, and leave when the standard input ends. TimeoutError: some did not begin."""
    request = load.request()
    callers = [await Caller.connected(load.port) for _ in range(load.count)]
    for caller in callers:
        caller.ask(request)
    async with asyncio.timeout(load.seconds):
        while not all(caller.begun for caller in callers):
            await asyncio.sleep(0.05)
    print("open", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    for caller in callers:
        caller.close()


async def _main(text: str) -> None:
    load = Load(**json.loads(text))
    if load.hold:
        await hold(load)
    else:
        print(json.dumps(asdict(await Run(load).apply())))


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1]))
