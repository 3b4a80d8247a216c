"""Server-sent events, cut out of a byte stream as it arrives. Pure: bytes in, bytes out.

Lines end at CR LF, LF or CR and nowhere else: U+2028 and its like are content
(https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream). An event ends at a blank line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from providers.errors import ProtocolError

MAX_EVENT_BYTES = 1024 * 1024
"""No event may be longer (R30); a longer one is an upstream that does not speak the protocol."""

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"\r\n|\n|\r")
_BLANK_LINE = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r(?!\n))")


class RawEvent(NamedTuple):
    """One event: its bytes with the blank line that ends it, its `data` lines joined by LF, its `event` name."""

    raw: bytes
    data: bytes
    name: bytes = b""

    @property
    def is_comment(self) -> bool:
        """Nothing in it is data: a comment such as `: keep-alive`, or the rest of a blank line."""
        return not self.data


class Splitter:
    """Hands on the complete events of a stream, untouched, and keeps the beginning of the next one.

    `feed` is for the hot path: bytes that end with an event are returned as they are, without a copy.
    """

    __slots__ = ("_limit", "_tail")

    def __init__(self, limit: int = MAX_EVENT_BYTES) -> None:
        self._limit = limit
        self._tail = bytearray()

    @property
    def tail(self) -> bytes:
        """What has come after the last complete event. An upstream may end without the last blank line."""
        return bytes(self._tail)

    def feed(self, data: bytes) -> bytes:
        """All complete events that are there now, or `b""`. Raises ProtocolError when one is above the limit."""
        if not self._tail:
            return self._feed_fresh(data)
        # Only the seam and the new bytes can hold a blank line: a longer look back would make a slow drip quadratic.
        seam = max(len(self._tail) - 2, 0)
        self._tail += data
        end = _end_of_last_event(self._tail, seam)
        self._check_sizes(self._tail, end)
        complete = bytes(self._tail[:end])
        del self._tail[:end]
        return complete

    def _feed_fresh(self, data: bytes) -> bytes:
        end = _end_of_last_event(data, 0)
        self._check_sizes(data, end)
        if end == len(data):
            return data
        self._tail += data[end:]
        return data[:end]

    def _check_sizes(self, buffer: bytes | bytearray, end: int) -> None:
        """Every event in `buffer`, complete or not, is within the limit."""
        if len(buffer) <= self._limit:
            return
        start = 0
        for blank in _BLANK_LINE.finditer(buffer, 0, end):
            if blank.end() - start > self._limit:
                raise ProtocolError(detail=f"an event is longer than {self._limit} bytes")
            start = blank.end()
        if len(buffer) - end > self._limit:
            raise ProtocolError(detail=f"an event is longer than {self._limit} bytes")


def _end_of_last_event(buffer: bytes | bytearray, start: int) -> int:
    """The index behind the last blank line, or 0.

    A blank line ends with LF LF, LF CR (LF) or CR CR (LF). At the end of the buffer the last LF may still be under way; it is
    then a line of its own at the beginning of the next event, where it means nothing, so that no event waits for it.
    """
    end = buffer.rfind(b"\n\n", start) + 2
    if buffer.find(b"\r", start) >= 0:
        after_return = max(buffer.rfind(b"\n\r", start), buffer.rfind(b"\r\r", start)) + 2
        if after_return > 1 and buffer[after_return : after_return + 1] == b"\n":
            after_return += 1
        end = max(end, after_return)
    return end if end > 1 else 0


def events(block: bytes, start: int = 0) -> Iterator[RawEvent]:
    """The events of `block` from `start` on, in order; their `raw` joined is that part of the block. What is not ended by a
    blank line comes last."""
    if block.find(b"\r", start) >= 0:
        for blank in _BLANK_LINE.finditer(block, start):
            yield _parse(block[start : blank.end()])
            start = blank.end()
    else:
        while (end := block.find(b"\n\n", start)) >= 0:
            yield _parse(block[start : end + 2])
            start = end + 2
    if start < len(block):
        yield _parse(block[start:])


def _parse(raw: bytes) -> RawEvent:
    if (
        raw.startswith(b"data: ")
        and raw.endswith(b"\n\n")
        and raw.find(b"\n") == len(raw) - 2
        and b"\r" not in raw
    ):
        return RawEvent(raw, raw[6:-2])
    data: list[bytes] = []
    name = b""
    for line in _LINE_END.split(raw.removeprefix(_BOM)):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value
    return RawEvent(raw, b"\n".join(data), name)
