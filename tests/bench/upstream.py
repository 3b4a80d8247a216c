"""A fast OpenAI-compatible upstream: `python -m tests.bench.upstream PORT`. It looks at as little of a request as it can.

The model's name says what comes back: `plain` one JSON answer, `stream` 100 chunks without a pause, `paced` 100 chunks, one
every 20 ms, `held` the same, one every second. Everything is prepared; a request costs a few microseconds.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from typing import cast

import uvloop

CHUNKS = 100
PACE_SECONDS = {b"paced": 0.02, b"held": 1.0}
LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
MODEL = re.compile(rb'"model": *"(\w+)"')
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
ENVELOPE = {"id": "chatcmpl-1", "created": 1_700_000_000, "model": "plain"}
USAGE = {"prompt_tokens": 10, "completion_tokens": CHUNKS, "total_tokens": CHUNKS + 10}
END = b"0\r\n\r\n"


def _framed(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _event(delta: dict[str, str], finish: str | None = None, **more: object) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    body = {**ENVELOPE, "object": "chat.completion.chunk", "choices": choices, **more}
    return _framed(b"data: %b\n\n" % json.dumps(body, separators=(",", ":")).encode())


def _whole() -> bytes:
    message = {"role": "assistant", "content": "word " * CHUNKS}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    body = json.dumps({**ENVELOPE, "object": "chat.completion", "choices": choices, "usage": USAGE}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


WHOLE = _whole()
ROLE = _event({"role": "assistant", "content": ""})
CHUNK = _event({"content": "word "})
CLOSING = _event({}, "stop") + _event({}, choices=[], usage=USAGE) + _framed(b"data: [DONE]\n\n") + END


class Answerer(asyncio.Protocol):
    """One connection; requests come one after another."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)  # uvloop's is no subclass of asyncio's
        self._received = b""
        self._pacer: asyncio.Task[None] | None = None

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if separator and len(body) >= (int(length[1]) if length else 0):
            self._received = b""
            self._answer(body)

    def connection_lost(self, error: Exception | None) -> None:
        if self._pacer is not None:
            self._pacer.cancel()

    def _answer(self, body: bytes) -> None:
        found = MODEL.search(body)
        model = found[1] if found else b""
        if model in PACE_SECONDS:
            self._pacer = asyncio.get_running_loop().create_task(self._pace(PACE_SECONDS[model]))
        elif model == b"stream":
            self._transport.write(STREAM_HEAD + ROLE)
            for _ in range(CHUNKS):
                self._transport.write(CHUNK)
            self._transport.write(CLOSING)
        else:
            self._transport.write(WHOLE)

    async def _pace(self, seconds: float) -> None:
        self._transport.write(STREAM_HEAD + ROLE)
        for _ in range(CHUNKS):
            await asyncio.sleep(seconds)
            self._transport.write(CHUNK)
        self._transport.write(CLOSING)


async def _serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Answerer, "127.0.0.1", port, backlog=1024)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
