"""Understanding an upstream's stream while its bytes pass by. Pure: bytes in, the bytes to forward out.

Before the answer has begun every event is read and held back, so that another provider may still be tried. Once it has, the
events of a stream are usually alike but for their text: those pass untouched and unread, for what they mean is known from
the one that was read. Every other event is read. From the finish reason on, everything is held until the final usage
record is written.
"""

from __future__ import annotations

import re
from itertools import takewhile

from providers import sse
from providers.errors import EmptyResponse, Interrupted, ProtocolError, ProviderError
from providers.wire import Chat, Event, Usage
from proxy.dialects.openai import DONE

_ODD = re.compile(rb'["\\\x00-\x1f]')
# Possessive, so that no place to come back to is kept for every character.
_STRING = re.compile(rb'(?:[^"\\\x00-\x1f]++|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+')


class AnswerReader:
    """One stream of one attempt.

    begun: it has content, so it is committed to the caller. complete: every choice has its finish reason, or the upstream
    said it is done. failure: what went wrong inside it; the bytes before it are still to be forwarded. events, text_bytes: how
    many events with a part of the answer there were, and how much text was in them. usage: of the whole answer; what was told
    before more of it came is not (some servers begin with a usage of nothing, or tell how far they are).
    """

    __slots__ = (
        "_chat", "_choices", "_held", "_held_bytes", "_like", "_splitter", "_wants_usage",
        "begun", "complete", "done", "events", "failure", "finish_reason", "text_bytes", "usage",
    )  # fmt: skip

    def __init__(self, chat: Chat, *, choices: int, wants_usage: bool) -> None:
        self._chat = chat
        self._choices = choices
        self._wants_usage = wants_usage
        self._splitter = sse.Splitter()
        self._held: list[bytes] = []
        self._held_bytes = 0
        self._like: tuple[bytes, bytes] | None = None
        self.begun = self.complete = self.done = False
        self.events = self.text_bytes = 0
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self.failure: ProviderError | None = None

    def feed(self, data: bytes) -> bytes:
        """What may be forwarded now that `data` has come; nothing while the answer is held back."""
        try:
            block = self._splitter.feed(data)
        except ProtocolError as error:
            self.failure = error
            return b""
        size = self._alike(block)
        if size == len(block):
            return block
        passed, position = [block[:size]], size
        while position < len(block):
            event = next(sse.events(block, position))
            position += len(event.raw)
            self._read(event)
            passed.append(self._release())
            if self.failure is not None or self.done:
                break
            size = self._alike(block, position)
            passed.append(block[position : position + size])
            position += size
        return b"".join(passed)

    def _alike(self, block: bytes, start: int = 0) -> int:
        """How many bytes from `start` on are events that differ from one that was read in their text alone."""
        if self._like is None or not self.begun or self.complete:
            return 0
        before, behind = self._like
        if not block.startswith(before, start):
            return 0
        # Cut where one ends and the next begins, so that a piece is a text; the last one goes on behind its end, if it has one.
        texts = block[start + len(before) :].split(behind + before)
        last, end, _ = texts.pop().partition(behind)
        if end:
            texts.append(last)
        if _ODD.search(b"".join(texts)):
            texts = list(takewhile(_STRING.fullmatch, texts))
        text_bytes = sum(map(len, texts))
        size = text_bytes + len(texts) * (len(before) + len(behind))
        if not _is_utf8(block, start, start + size):
            return 0
        self.events += len(texts)
        self.text_bytes += text_bytes
        if texts:
            self.usage = None
        return size

    def _read(self, event: sse.RawEvent) -> None:
        if event.is_comment:
            if self.begun and not self.complete:
                self._held.append(event.raw)
            return
        try:
            meaning = self._chat.read_event(event.data)
        except ProviderError as error:
            meaning = Event(error=error)
        if meaning.error is not None and not self.complete:
            self.failure = meaning.error
        else:
            self._take(event, meaning)

    def _take(self, event: sse.RawEvent, meaning: Event) -> None:
        if meaning.usage is not None:
            self.usage = meaning.usage
        elif meaning.commits and (meaning.finish_reason is None or self._chat.around_text(event.raw)):
            self.usage = None
        self.begun = self.begun or meaning.commits
        if meaning.done:
            # What never began did not end well either; `ended` tells.
            self.done, self.complete = True, self.begun
            return
        self.events += meaning.commits
        if meaning.finish_reason is not None:
            self.finish_reason = self.finish_reason or meaning.finish_reason
            self._choices -= meaning.finished
            self.complete = self._choices <= 0
        elif meaning.commits and meaning.usage is None:
            self._like = self._chat.around_text(event.raw)
            if self._like is not None:
                self.text_bytes += len(event.raw) - sum(map(len, self._like))
        if meaning.error is None and (not meaning.usage_only or self._wants_usage):
            self._hold(self._told(event))

    def _hold(self, told: bytes) -> None:
        """Keep an event for the caller. Before an answer begins, and after it is complete, no more than one event may have."""
        self._held_bytes += len(told)
        if self._held_bytes <= sse.MAX_EVENT_BYTES or (self.begun and not self.complete):
            self._held.append(told)
        elif self.complete:
            self.done = True  # It has all that it needs.
        else:
            self.failure = ProtocolError(detail=f"{sse.MAX_EVENT_BYTES} bytes of events without any content")

    def _told(self, event: sse.RawEvent) -> bytes:
        """What the caller is given for an event."""
        return event.raw

    def _release(self) -> bytes:
        """What was held, unless the answer has not begun or its end waits for the record."""
        if not self.begun or (self.complete and self.failure is None):
            return b""
        released = b"".join(self._held)
        self._held.clear()
        self._held_bytes = 0
        return released

    def ended(self) -> bytes:
        """The upstream has closed its stream: what is left to forward. Sets `failure` when the stream is not whole."""
        left = b"" if self.complete or self.done else self.feed(b"\n\n")
        if not self.complete and self.failure is None:
            self.failure = Interrupted() if self.begun else EmptyResponse()
        return left

    def last_bytes(self) -> bytes:
        """The end of a complete answer: finish reason, usage if asked for, and `[DONE]`."""
        return b"".join(self._held) + DONE


def _is_utf8(block: bytes, start: int, end: int) -> bool:
    try:
        block[start:end].decode()
    except UnicodeDecodeError:
        return False
    return True
