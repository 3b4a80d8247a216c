"""A copy of what a caller is given, for keys that keep it: whole for the cache, as text for the record. Pure.

Nothing of this exists for keys that keep nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import orjson

from providers import sse
from providers.adapters.json_values import mapping
from proxy.attempts import Attempt
from proxy.relay import Sink

CUT = " [cut]"
MAX_PARSED_BYTES = 1024 * 1024
"""Of a longer answer that is not streamed the beginning is kept as it came: reading all of it would hold up others."""


class Copy:
    """A sink in front of another one. whole: everything that was sent, once it is complete and as far as `most_bytes` goes.

    text: the beginning of the answer in words, at most `most_text` bytes of it. first: the attempt that began it.
    """

    def __init__(self, sink: Sink, *, most_bytes: int = 0, most_text: int = 0) -> None:
        self._sink = sink
        self._parts: list[bytes] | None = [] if most_bytes else None
        self._left = most_bytes
        self._text = Clip(most_text)
        self._complete = False
        self.first: Attempt | None = None

    @property
    def begun(self) -> bool:
        return self._sink.begun

    @property
    def whole(self) -> bytes | None:
        return b"".join(self._parts) if self._complete and self._parts is not None else None

    @property
    def text(self) -> str:
        return str(self._text)

    async def begin(self, attempt: Attempt, length: int | None = None) -> None:
        self.first = attempt
        await self._sink.begin(attempt, length)

    async def send(self, data: bytes) -> None:
        self._take(data)
        await self._sink.send(data)

    async def end(self, data: bytes) -> None:
        self._take(data)
        await self._sink.end(data)
        self._complete = True

    async def keep_alive(self) -> None:
        await self._sink.keep_alive()

    def _take(self, data: bytes) -> None:
        if self._parts is not None:
            self._left -= len(data)
            if self._left < 0:
                self._parts = None
            else:
                self._parts.append(data)
        if self._text.left and self.first is not None:
            for words in said(data, streamed=self.first.call.chat.stream):
                self._text.add(words)


class Clip:
    """Text up to a number of UTF-8 bytes; what is cut says so."""

    def __init__(self, most: int) -> None:
        self._parts: list[str] = []
        self.left = most

    def add(self, text: str) -> None:
        if not self.left:
            return
        data = text[: self.left + 1].encode(errors="replace")
        if len(data) > self.left:
            data = data[: max(0, self.left - len(CUT))] + CUT.encode()
            self.left = len(data)
        self.left -= len(data)
        self._parts.append(data.decode(errors="ignore"))

    def __str__(self) -> str:
        return "".join(self._parts)


def said(data: bytes, *, streamed: bool) -> Iterator[str]:
    """The words in a piece of an answer: contents, reasoning, and calls of tools with their arguments."""
    if not streamed and len(data) > MAX_PARSED_BYTES:
        yield data[:MAX_PARSED_BYTES].decode(errors="replace")
        return
    blocks = [event.data for event in sse.events(data)] if streamed else [data]
    for block in blocks:
        try:
            answer = mapping(orjson.loads(block))
        except orjson.JSONDecodeError:
            continue  # a comment, or [DONE]
        for choice in map(mapping, listed(answer.get("choices"))):
            yield from _said(mapping(choice.get("delta") or choice.get("message")))


def _said(message: Any) -> Iterator[str]:
    for name in ("reasoning_content", "reasoning", "content", "refusal"):
        if isinstance(message.get(name), str):
            yield message[name]
    for call in map(mapping, listed(message.get("tool_calls"))):
        function = mapping(call.get("function"))
        yield from (function[name] for name in ("name", "arguments") if isinstance(function.get(name), str))


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
