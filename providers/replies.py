"""Answers on their way: over the network, or from inside this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote

from multidict import CIMultiDict, CIMultiDictProxy

from providers import errors, sse
from providers.crypto import DOTS, Secret
from providers.wire import Answer

MAX_ERROR_BYTES = 65_536
ERROR_SECONDS = 1.0
"""How long an error's body is waited for: its status says most, and somebody else may have an answer."""
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
    """An error's reply, cleaned of the secret that upstreams like to repeat there (R53). Its body comes at once: cut into pieces
    the secret could slip through a seam."""

    __slots__ = ("_reply", "_secret", "headers", "status")

    def __init__(self, reply: Reply, secret: Secret | None) -> None:
        self._reply = reply
        self._secret = secret
        self.status = reply.status
        self.headers = reply.headers

    async def read(self) -> bytes:
        """All of it that anybody needs; nothing when it is read again."""
        body = await read_beginning(self._reply)
        self._reply.close()
        return _without_beginning_of(self._secret, redact(body, self._secret)[:MAX_ERROR_BYTES])

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


async def read_beginning(reply: Reply) -> bytes:
    """As much of an error's body as there is and is useful; that it breaks off or stalls changes nothing about the error."""
    body = bytearray()
    with contextlib.suppress(errors.ProviderError, TimeoutError):
        async with asyncio.timeout(ERROR_SECONDS):
            while len(body) < MAX_ERROR_BYTES and (part := await reply.read()):
                body += part
    return bytes(body)


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
    for form in _forms(secret):
        body = body.replace(form, DOTS.encode())
    return body


def _without_beginning_of(secret: Secret | None, body: bytes) -> bytes:
    """A body that ends within the secret, without what it has of it."""
    for form in _forms(secret):
        for length in range(len(form) - 1, 3, -1):
            if body.endswith(form[:length]):
                return body[:-length]
    return body


def _forms(secret: Secret | None) -> set[bytes]:
    """How it may stand in an error. Shorter ones are words like "none" that people enter for servers without keys."""
    value = "" if secret is None else secret.reveal()
    if len(value) < 8:
        return set()
    return {form.encode() for form in (value, json.dumps(value)[1:-1], quote(value, safe=""))}


def words(error: BaseException) -> str:
    """A foreign exception in one line, for the detail of ours."""
    return f"{type(error).__name__}: {error}"
