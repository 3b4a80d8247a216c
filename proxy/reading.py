"""Understanding an upstream's stream while its bytes pass by. Pure: bytes in, the bytes to forward out.

Before the answer has begun every event is read and held back, so that another provider may still be tried. Once it has,
whole blocks of events pass untouched, up to where the adapter sees something worth reading; what it sees there never
decides, only what the event says does. From the finish reason on, everything is held until the final usage record is written.
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
        return self._pass(block) if self.begun and not self.complete else self._read(block)

    def _pass(self, block: bytes) -> bytes:
        """Hand on untouched what stands before the first event that somebody here needs to read."""
        marked = self._chat.first_marked(block)
        if marked < 0:
            plain = block
        else:
            blank = block.rfind(b"\n\n", 0, marked)
            plain = block[: blank + 2] if blank >= 0 else b""
        count = plain.count(b"\n\n")
        if count != plain.count(b"}\n\n"):
            return self._read(block)
        self.events += count
        return plain if marked < 0 else plain + self._read(block[len(plain) :])

    def _read(self, block: bytes) -> bytes:
        position = 0
        for event in sse.events(block):
            position += len(event.raw)
            if event.is_comment:
                if self.begun and not self.complete:
                    self._held.append(event.raw)
                continue
            begun = self.begun
            if not self._understand(event):
                break
            if self.begun and not begun and not self.complete:
                return self._release() + self._pass(block[position:])
        return self._release()

    def _understand(self, event: sse.RawEvent) -> bool:
        """Read one event; whether the stream goes on after it."""
        try:
            meaning = self._chat.read_event(event.data)
        except ProviderError as error:
            meaning = Event(error=error)
        if meaning.error is not None and not self.complete:
            self.failure = meaning.error
            return False
        self._take(event.raw, meaning)
        return not self.done

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
