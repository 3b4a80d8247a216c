"""A caller who asks for a long stream and reads nothing, and the provider who sends it."""

from __future__ import annotations

import json
import socket

from tests.support.answers import SSE, Answer
from tests.support.http_server import Behaviour, Exchange
from tests.support.ports import LOOPBACK
from tests.support.told import CHAT, question


def endless(size: int = 100 * 1024 * 1024) -> Behaviour:
    """A stream of so many bytes, as fast as they are taken."""

    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, SSE)
        (block,) = Answer(texts=["x" * 16_000]).content(exchange.request)
        for _ in range(size // len(block)):
            await exchange.chunk(block)
        await exchange.end()

    return behave


def stalled_reader(port: int, key: str, name: str) -> socket.socket:
    """The caller, with the smallest buffer that the kernel gives him."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    wire.connect((LOOPBACK, port))
    body = json.dumps(question(name, stream=True)).encode()
    head = (
        f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {key}\r\nx-request-id: {name}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    wire.sendall(head.encode() + body)
    return wire
