"""Understanding an upstream's stream while its bytes pass by. Pure: bytes in, the bytes to forward out.

Before the answer has begun every event is read and held back, so that another provider may still be tried. Once it has,
whole blocks of events pass untouched unless the adapter's marker selects one of them to be read; a marker never
decides. From the finish reason on, everything is held until the final usage record is written.
"""

from __future__ import annotations

from providers import sse
from providers.errors import EmptyResponse, Interrupted, ProtocolError, ProviderError
from providers.wire import Chat, Event, Usage
from proxy.dialects.openai import DONE


class AnswerReader:
    """One stream of one attempt.

    begun: it has content, so it is committed to the caller. complete: every choice has its finish reason, or the upstream
    said it is done. failure: what went wrong inside it; the bytes before it are still to be forwarded.
    """

    __slots__ = (
        "_chat", "_choices", "_held", "_splitter", "_wants_usage",
        "begun", "complete", "done", "events", "failure", "finish_reason", "usage",
    )  # fmt: skip

    def __init__(self, chat: Chat, *, choices: int, wants_usage: bool) -> None:
        self._chat = chat
        self._choices = choices
        self._wants_usage = wants_usage
        self._splitter = sse.Splitter()
        self._held: list[bytes] = []
        self.begun = self.complete = self.done = False
        self.events = 0
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
        if self.begun and not self.complete and self._looks_plain(block):
            return block
        return self._read(block)

    def _looks_plain(self, block: bytes) -> bool:
        """Whether the block is nothing but events of JSON objects that nobody here needs to read."""
        count = block.count(b"\n\n")
        if count != block.count(b"}\n\n") or self._chat.marker.search(block):
            return False
        self.events += count
        return True

    def _read(self, block: bytes) -> bytes:
        for event in sse.events(block):
            if event.is_comment:
                if self.begun and not self.complete:
                    self._held.append(event.raw)
                continue
            try:
                meaning = self._chat.read_event(event.data)
            except ProviderError as error:
                meaning = Event(error=error)
            if meaning.error is not None and not self.complete:
                self.failure = meaning.error
                break
            self._take(event.raw, meaning)
            if self.done:
                break
        return self._release()

    def _take(self, raw: bytes, meaning: Event) -> None:
        self.usage = meaning.usage or self.usage
        self.begun = self.begun or meaning.commits
        if meaning.done:
            # What never began did not end well either; `ended` tells.
            self.done, self.complete = True, self.begun
            return
        self.events += meaning.commits
        if meaning.finish_reason is not None:
            self.finish_reason = self.finish_reason or meaning.finish_reason
            self._choices -= 1
            self.complete = self._choices <= 0
        if meaning.error is None and (not meaning.usage_only or self._wants_usage):
            self._held.append(raw)

    def _release(self) -> bytes:
        """What was held, unless the answer has not begun or its end waits for the record."""
        if not self.begun or (self.complete and self.failure is None):
            return b""
        released = b"".join(self._held)
        self._held.clear()
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
