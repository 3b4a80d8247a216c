"""Going on with a stream that broke after its caller had a part of it. Pure: bytes and bodies in, bytes and bodies out.

Where the next provider can go on with an answer that has begun (a prefill), it is asked to. Else the request is made again, at
temperature 0, and what comes is passed on only once it has begun with exactly what was delivered. Whatever cannot be
gone on with honestly stays broken: tool calls, reasoning, several choices, probabilities, formats and grammars, long texts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import orjson

from providers import sse
from providers.adapters.json_values import dump, mapping, parse_object
from providers.errors import AnotherAnswer, Interrupted, ProviderError, UpstreamRefused
from providers.wire import Chat, Event, Usage
from proxy.reading import AnswerReader

Way = Literal["prefill", "restart"]

MAX_TEXT_BYTES = 256 * 1024
FOLD_BYTES = 64 * 1024
"""Of a stream's bytes are kept before the text is taken out of them: short answers are never read twice."""

HINDERING = (
    "logprobs", "top_logprobs", "response_format", "grammar", "json_schema", "guided_json", "guided_regex",
    "guided_grammar", "guided_choice", "structured_outputs",
)  # fmt: skip
LIMITS = ("max_tokens", "max_completion_tokens")
MOST_STOPS, LONGEST_STOP = 16, 256
"""Stop strings, and characters in one, for which a seam is watched: each of its events is compared with all of them."""


def may_resume(body: Mapping[str, Any]) -> bool:
    """Whether a stream that this request begins could be gone on with at all."""
    return body.get("n") in (None, 1) and not any(body.get(name) for name in HINDERING)


class Resumption:
    """What the caller of one stream was given, and how another provider may go on from there.

    broke: what is told when nobody can. id, created: those of the first attempt, which the stream keeps.
    """

    def __init__(self, body: Mapping[str, Any]) -> None:
        self._body = body
        self._blocks: list[bytes] = []
        self._size = 0
        self._plain = True
        self._text = ""
        self._refused: set[str] = set()
        self._asked: dict[str, Way] = {}
        self.broke: ProviderError | None = None
        self.envelope: dict[str, Any] = {}
        self.tokens = 0

    def add(self, block: bytes) -> None:
        """These events were sent to the caller."""
        if not self._plain:
            return
        self._blocks.append(block)
        self._size += len(block)
        if self._size > FOLD_BYTES:
            self._fold()

    @property
    def text(self) -> str:
        self._fold()
        return self._text

    def ways(self, chat: Chat, who: str) -> list[Way]:
        """How the provider `who` could go on, the better one first; none when it cannot."""
        self._fold()
        if not self._plain or not self._text or self._left() == 0:
            return []
        ways: list[Way] = []
        if (
            chat.prefill is not None
            and who not in self._refused
            and self._text.strip()
            and not self._continues()
            and _can_be_watched(_stops(self._body))
        ):
            ways.append("prefill")
        if self._body.get("temperature") == 0:
            ways.append("restart")
        return ways

    def broken(self, who: str, error: ProviderError) -> bool:
        """Note that `who` broke off, or could not go on; whether to ask it once more, in another way.

        One that refuses a prefilled answer is asked from the beginning, and the caller never hears of its refusal.
        """
        if self.broke is None:
            self.broke = error
            return False
        if (
            not isinstance(error, UpstreamRefused)
            or self._asked.get(who) != "prefill"
            or who in self._refused
        ):
            return False
        self._refused.add(who)
        return True

    def spoil(self) -> None:
        """Nobody knows how much of the last events the caller has: nothing can be gone on with."""
        self._plain, self._text, self._blocks = False, "", []

    def body(self, chat: Chat, way: Way, who: str = "") -> Mapping[str, Any]:
        """The request that goes on, for `who`."""
        self._asked[who] = way
        if way == "restart" or chat.prefill is None:
            return self._body
        body = dict(chat.prefill(self._body, self.text.rstrip()))
        for name in LIMITS:
            if type(body.get(name)) is int:
                body[name] -= self.tokens
        return body

    def reader(self, chat: Chat, way: Way, *, wants_usage: bool) -> ContinuationReader:
        return ContinuationReader(chat, self, way, stops=_stops(self._body), wants_usage=wants_usage)

    def _continues(self) -> bool:
        """Whether the request itself already ends with the beginning of an answer."""
        messages = self._body.get("messages")
        return bool(
            isinstance(messages, list) and messages and mapping(messages[-1]).get("role") == "assistant"
        )

    def _left(self) -> int | None:
        """How many tokens may still come, where the caller said how many may come."""
        limits = [self._body[name] for name in LIMITS if type(self._body.get(name)) is int]
        return max(0, min(limits) - self.tokens) if limits else None

    def _fold(self) -> None:
        """Take the text out of the blocks, and forget them."""
        blocks, self._blocks, self._size = self._blocks, [], 0
        if not blocks or not self._plain:
            return
        events = (event.data for event in sse.events(b"".join(blocks)) if event.data.strip())
        try:
            self._text = "".join([self._text, *(self._read(orjson.loads(data)) for data in events)])
        except (ValueError, TypeError, AttributeError):
            # Half a character in a text, say: good enough to pass, and nothing to go on from.
            self.spoil()
        if len(self._text.encode(errors="replace")) > MAX_TEXT_BYTES:
            self._plain, self._text = False, ""

    def _read(self, chunk: Mapping[str, Any]) -> str:
        """The text of one chunk; notes whatever makes this more than plain text."""
        if not self.envelope:
            self.envelope = {name: chunk[name] for name in ("id", "created") if name in chunk}
        said = ""
        for each in chunk.get("choices") or ():
            choice = mapping(each)
            delta = mapping(choice.get("delta"))
            content = delta.get("content")
            holds = {name for name, value in delta.items() if value and name != "role"}
            if choice.get("index", 0) != 0 or holds - {"content"} or not isinstance(content, str | None):
                self._plain = False
            elif content:
                said += content
                self.tokens += 1
        return said


class Seam:
    """Stop strings that begin in the text of one provider and end in the other's, so that neither sees them.

    stopped: one was found; the text ends there.
    """

    def __init__(self, before: str, stops: list[str]) -> None:
        keep = max(map(len, stops), default=1) - 1
        self._before = before[-keep:] if keep else ""
        self._stops = stops
        self._held = ""
        self.stopped = False

    def cross(self, text: str) -> str:
        """What may be told now: nothing while a stop string that began before the seam may still become whole."""
        if not self._before:
            return text
        self._held += text
        joined, old = self._before + self._held, len(self._before)
        if any(-1 < joined.find(stop) < old for stop in self._stops):
            self.stopped, self._held = True, ""
            return ""
        if any(
            stop.startswith(joined[start:])
            for stop in self._stops
            for start in range(max(0, len(joined) - len(stop)), old)
        ):
            return ""
        return self.rest()

    def rest(self) -> str:
        """What was held back, once nothing can follow that would make a stop string of it."""
        held, self._held, self._before = self._held, "", ""
        return held


class ContinuationReader(AnswerReader):
    """Reads the stream of the one who goes on, and makes it the end of the stream that the caller has begun to read."""

    __slots__ = ("_delivered", "_expected", "_resumption", "_seam", "_way", "_white")

    def __init__(
        self, chat: Chat, resumption: Resumption, way: Way, *, stops: list[str], wants_usage: bool
    ) -> None:
        super().__init__(chat, choices=1, wants_usage=wants_usage)
        text = resumption.text
        self._delivered = resumption.tokens
        self._resumption = resumption
        self._way = way
        self._expected = text if way == "restart" else ""
        self._white = text[len(text.rstrip()) :] if way == "prefill" else ""
        self._seam = Seam(text, stops if way == "prefill" else [])

    def _alike(self, block: bytes, start: int = 0) -> int:
        """Every event is read: none goes on as it came."""
        return 0

    def _take(self, event: sse.RawEvent, meaning: Event) -> None:
        super()._take(event, meaning)
        if meaning.done and self._seam.rest():
            # It ended without a reason, and in the middle of what would have been one.
            self.complete, self.failure = False, Interrupted()
        if self.complete and self._expected and self.failure is None:
            self._held.clear()
            self.failure = AnotherAnswer(
                detail="the new answer ended before the point where the first one broke"
            )

    def _told(self, event: sse.RawEvent) -> bytes:
        chunk = parse_object(event.data)
        keeps = False
        for choice in filter(mapping, chunk.get("choices") or ()):
            choice["delta"] = delta = self._delta(mapping(choice.get("delta")))
            if choice.get("finish_reason") is not None and (rest := self._seam.rest()):
                delta["content"] = rest + delta.get("content", "")
            if self._seam.stopped:
                choice["finish_reason"] = self.finish_reason = "stop"
                self.complete = self.done = True
            keeps = keeps or bool(delta) or choice.get("finish_reason") is not None
        if self.failure is not None:
            return b""
        if isinstance(chunk.get("usage"), dict):
            chunk["usage"] = self._usage_of_all()
            keeps = True
        if not keeps:
            return b""
        return b"data: " + dump({**chunk, **self._resumption.envelope}) + b"\n\n"

    def _delta(self, delta: Mapping[str, Any]) -> dict[str, Any]:
        """What is new in it: no role, no reasoning about an answer that has begun, no text that the caller has."""
        content = delta.get("content")
        told = {
            "content": self._new(content) if isinstance(content, str) else "",
            "tool_calls": delta.get("tool_calls"),
        }
        if self._expected and told["tool_calls"]:
            self.failure = AnotherAnswer(detail="the new answer is a tool call")
        return {name: value for name, value in told.items() if value}

    def _new(self, text: str) -> str:
        if self._expected:
            known, self._expected = self._expected[: len(text)], self._expected[len(text) :]
            if not text.startswith(known):
                self.failure = AnotherAnswer(detail="the new answer is another one")
                return ""
            text = text[len(known) :]
        while self._white and text.startswith(self._white[0]):
            self._white, text = self._white[1:], text[1:]
        if text:
            self._white = ""
        return self._seam.cross(text)

    def _usage_of_all(self) -> dict[str, int]:
        """As if one provider had answered: the original prompt, and all tokens that were delivered."""
        usage = self.usage or Usage()
        prompt, completion = usage.prompt, usage.completion
        if self._way == "prefill":
            prompt, completion = max(0, prompt - self._delivered), completion + self._delivered
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }


def _can_be_watched(stops: list[str]) -> bool:
    return len(stops) <= MOST_STOPS and max(map(len, stops), default=0) <= LONGEST_STOP


def _stops(body: Mapping[str, Any]) -> list[str]:
    stop = body.get("stop")
    found = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    return [each for each in found if isinstance(each, str) and each]
