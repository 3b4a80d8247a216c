"""Answers on their way: over the network, or from inside this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote

from multidict import CIMultiDict, CIMultiDictProxy

from providers import errors, sse
from providers.crypto import DOTS, Secret
from providers.wire import Answer

MAX_ERROR_BYTES = 65_536
ECHO_PAUSE = 0.02
"""Seconds between the words of a local answer, so that one can see it stream."""


class Reply(Protocol):
    """The head of an answer, and its body as it arrives. Whoever has it closes it."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Case-insensitive."""
        ...

    async def read(self) -> bytes:
        """Some bytes, as soon as there are any; `b""` at the clean end. Raises Interrupted when the connection breaks."""
        ...

    def close(self) -> None:
        """Idempotent and immediate: the connection is dropped unless the body was read to its end."""
        ...


class ErrorReply:
    """An error's reply, cleaned of the secret that upstreams like to repeat there (R53)."""

    __slots__ = ("_reply", "_secret", "headers", "status")

    def __init__(self, reply: Reply, secret: Secret) -> None:
        self._reply = reply
        self._secret: Secret | None = secret
        self.status = reply.status
        self.headers = reply.headers

    async def read(self) -> bytes:
        """All of its text that anybody needs, at once: cut into pieces the secret could slip through a seam."""
        if self._secret is None:
            return await self._reply.read()
        secret, self._secret = self._secret, None
        body = bytearray()
        while len(body) < MAX_ERROR_BYTES and (part := await self._reply.read()):
            body += part
        if len(body) >= MAX_ERROR_BYTES:
            self._reply.close()
        return redact(bytes(body), secret)[:MAX_ERROR_BYTES]

    def close(self) -> None:
        self._reply.close()


class LocalReply:
    """A reply from inside this process, handed out event by event."""

    def __init__(self, answer: Answer, pause: float = ECHO_PAUSE) -> None:
        self.status = answer.status
        self.headers: Mapping[str, str] = CIMultiDictProxy(CIMultiDict(answer.headers))
        streamed = "event-stream" in self.headers.get("Content-Type", "")
        self._pause = pause if streamed else 0.0
        self._parts = [event.raw for event in sse.events(answer.body)] if streamed else [answer.body]
        self._parts.reverse()

    async def read(self) -> bytes:
        if not self._parts:
            return b""
        await asyncio.sleep(self._pause)
        return self._parts.pop()

    def close(self) -> None:
        self._parts.clear()


async def read_bounded(reply: Reply, limit: int) -> bytes:
    """The whole body. Raises ProtocolError, and closes the reply, when it is above `limit` bytes (R30)."""
    parts: list[bytes] = []
    size = 0
    while part := await reply.read():
        parts.append(part)
        size += len(part)
        if size > limit:
            reply.close()
            raise errors.ProtocolError(detail=f"the answer is above {limit} bytes")
    # Parts that only become one at the end: one that grows is moved, and then takes twice its room.
    return parts[0] if len(parts) == 1 else b"".join(parts)


def redact(body: bytes, secret: Secret | None) -> bytes:
    """`body` without the secret, which upstreams like to repeat in their errors (R53), plain, in JSON or in a URL."""
    if secret is None:
        return body
    value = secret.reveal()
    # Shorter ones are words like "none" that people enter for servers without keys.
    if len(value) < 8:
        return body
    for form in {value, json.dumps(value)[1:-1], quote(value, safe="")}:
        body = body.replace(form.encode(), DOTS.encode())
    return body


def words(error: BaseException) -> str:
    """A foreign exception in one line, for the detail of ours."""
    return f"{type(error).__name__}: {error}"
