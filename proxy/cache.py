"""Answers that are kept for a while: the same question of the same owner is answered without asking a provider.

Off unless a gateway key says for how many seconds (`cache_seconds`). What is looked up is named by an HMAC over everything that decides
the answer: whose it is and when his cache was last emptied, the purpose, the rule that resolved the model, who could answer, and the request itself.
What is stored is sealed, so Redis sees neither; whatever does not open is a miss, and so is a Redis that is away.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from providers import sealing
from providers.wire import Usage
from proxy import metrics
from proxy.attempts import Attempt, Call
from proxy.auth import RawHeaders
from proxy.candidates import Candidate
from proxy.limits_redis import Link, LinkFailed, Operation
from proxy.needs import choices

PREFIX = "penstock:cache:"
MAX_REQUEST_BYTES = 256 * 1024
MAX_ANSWER_BYTES = 256 * 1024
MAX_VALUE_BYTES = MAX_ANSWER_BYTES + 4096
"""As it is in Redis. What is longer was not put there by us, and is not read."""
MAX_KEPT_BYTES = 64 * 1024 * 1024
"""That all processes of a machine keep at the same time: the limits need Redis, too, and it is theirs first."""
WHOLE = frozenset({"stop", "length", "tool_calls", "function_call"})
"""Finish reasons of answers that would be given again; a filter's word may be another one next time."""


class Slot(NamedTuple):
    """The place of one question. reads: whether what is there may be used."""

    name: str
    seconds: int
    reads: bool


@dataclass(frozen=True, slots=True)
class Found:
    """An answer from the cache: who gave it, what it used, and its bytes as they were sent."""

    candidate: Candidate
    usage: Usage
    source: str
    body: bytes


class Cache:
    """What one process reads and keeps. link: the way to Redis that the limits use; None keeps nothing. workers: see MAX_KEPT_BYTES."""

    def __init__(self, link: Link | None, *, workers: int = 1) -> None:
        self._link = link
        self._most = MAX_KEPT_BYTES // max(1, workers)
        self._kept: list[tuple[float, int]] = []
        self._bytes = 0

    async def find(self, slot: Slot | None, call: Call) -> Found | None:
        """What is there and still good. One question to Redis, which is waited for as long as the limits wait."""
        found = None
        if slot is not None and slot.reads and self._link is not None and not self._link.open:
            try:
                value = await self._link.read(slot.name, most=MAX_VALUE_BYTES)
            except LinkFailed:
                value = b""
            found = _opened(value, slot, call)
        metrics.CACHE.labels("miss" if found is None else "hit").inc()
        return found

    def keep(self, slot: Slot, attempt: Attempt, body: bytes) -> None:
        """Put an answer there, if it is whole. Does not wait; what Redis refuses is not kept."""
        if self._link is None or self._link.open or attempt.finish_reason not in WHOLE:
            return
        usage, source = attempt.counted()
        head = {"at": time.time(), "from": attempt.candidate.full_name, "usage": [*usage], "source": source}
        value = sealing.seal_value(orjson.dumps(head) + b"\n" + body, name=slot.name)
        if len(value) <= MAX_VALUE_BYTES and self._has_room(len(value), slot.seconds):
            self._link.send(Operation(("SET", slot.name, value, "EX", slot.seconds)))

    def _has_room(self, size: int, seconds: int) -> bool:
        now = time.monotonic()
        while self._kept and self._kept[0][0] <= now:
            self._bytes -= heapq.heappop(self._kept)[1]
        if self._bytes + size > self._most:
            return False
        heapq.heappush(self._kept, (now + seconds, size))
        self._bytes += size
        return True


def slot_of(call: Call, headers: RawHeaders) -> Slot | None:
    """Where the answer to this request would be; None for one whose answer may be another one next time, and for long ones."""
    caller, body = call.running.caller, call.chat.body
    temperature = body.get("temperature")
    if caller.cache_seconds is None or temperature != 0 or isinstance(temperature, bool):
        return None
    if choices(body) > 1:
        # Of several answers only one reason to finish is known, and the others may be a filter's.
        return None
    wishes = _wishes(headers)
    if call.body_bytes > MAX_REQUEST_BYTES or "no-store" in wishes:
        return None
    question = [caller.cache_scope, call.purpose, call.plan.route, _who(call), body]
    try:
        text = orjson.dumps(question, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # a number beyond 64 bits
        return None
    return Slot(PREFIX + sealing.hidden_name(text), caller.cache_seconds, "no-cache" not in wishes)


def _who(call: Call) -> list[Any]:
    """Everybody who could be asked now, in no order: strategies take turns, and whoever's turn it is may answer."""
    endpoints = ((each.model, each.upstream.endpoint) for each in call.plan.candidates)
    return sorted([model, at.kind, at.uid, at.base_url, *map(list, at.headers)] for model, at in endpoints)


def _wishes(headers: RawHeaders) -> set[str]:
    """The directives of `Cache-Control` and its older spelling."""
    said = [value.decode("latin-1") for name, value in headers if name in {b"cache-control", b"pragma"}]
    return {word.strip().lower() for word in ",".join(said).split(",")} if said else set()


def _opened(value: bytes, slot: Slot, call: Call) -> Found | None:
    """What a stored value says, if we sealed it for this question, it is young enough, and who gave it could answer now."""
    plain = sealing.unseal_value(value, name=slot.name)
    if plain is None:
        return None
    line, _, body = plain.partition(b"\n")
    head: Mapping[str, Any] = orjson.loads(line)
    candidate = next((each for each in call.plan.candidates if each.full_name == head["from"]), None)
    # Redis forgets it in time, but whoever can write to Redis can make it remember.
    if candidate is None or time.time() - head["at"] > slot.seconds:
        return None
    return Found(candidate._replace(credential=None, spares=()), Usage(*head["usage"]), head["source"], body)
