"""Answers on their way: over the network, or from inside this process."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Protocol
from urllib.parse import quote

import aiohttp
from multidict import CIMultiDict, CIMultiDictProxy

from providers import errors, sse
from providers.crypto import DOTS, Secret
from providers.wire import Answer

MAX_ERROR_BYTES = 65_536
FEW_PIECES = 4
"""Of fewer it makes no difference how they are read."""
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


class HttpReply:
    """A reply that comes over the network. With a `secret`, the body is an error's, and is cleaned of it."""

    __slots__ = ("_cut_off", "_response", "_secret", "headers", "status")

    def __init__(self, response: aiohttp.ClientResponse, secret: Secret | None) -> None:
        self._response = response
        self._secret = secret
        self._cut_off = False
        self.status = response.status
        self.headers: Mapping[str, str] = response.headers

    async def read(self) -> bytes:
        if self._secret is not None:
            return await self._read_error()
        return b"" if self._cut_off else await self._some()

    async def _some(self) -> bytes:
        try:
            return await _read_pieces(self._response.content)
        except (aiohttp.ClientError, OSError) as error:
            raise errors.Interrupted(detail=words(error)) from error

    async def _read_error(self) -> bytes:
        """All of an error's text that anybody needs, at once: cut into pieces the secret could slip through a seam."""
        body = bytearray()
        while len(body) < MAX_ERROR_BYTES and (part := await self._some()):
            body += part
        if len(body) >= MAX_ERROR_BYTES:
            self._cut_off = True
            self._response.close()
        secret, self._secret = self._secret, None
        return redact(bytes(body), secret)[:MAX_ERROR_BYTES]

    def close(self) -> None:
        self._secret = None
        self._response.close()


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


async def _read_pieces(content: aiohttp.StreamReader) -> bytes:
    """What has arrived, once something has; `b""` at the end.

    aiohttp's `readany()` takes one HTTP chunk after the other and asks for more after each: of a stream that is one for each
    token, which made a fifth of what the whole stream cost. There is no public way to take them at once.
    """
    if content.at_eof():
        return b""
    while not (content._buffer or content._eof or content._exception):
        await content._wait("read")
    if content._exception is not None or content._buffer_offset or len(content._buffer) < FEW_PIECES:
        return await content.readany()
    data = b"".join(content._buffer)
    content._buffer.clear()
    content._size = 0
    content._cursor += len(data)
    if content._http_chunk_splits is not None:
        content._http_chunk_splits.clear()
    content._protocol.resume_reading()
    return data


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
