"""How much a key may do: requests and tokens a minute, and requests at the same time.

Redis counts for all processes. When it is away, each process goes on by itself with its share of every limit, from what it
admitted in the last minute, and hands that in when Redis is back. A request never fails because of Redis.
"""

from __future__ import annotations

import asyncio
import itertools
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from proxy.auth import Caller
from proxy.errors import ConcurrencyLimited, RateLimited
from proxy.limits_local import SECOND, Book, KeyState, Reading, duration
from proxy.limits_lua import ADD, HOLD, KEEP
from proxy.limits_redis import Link, LinkFailed, Operation, Words, call

Headers = tuple[tuple[bytes, bytes], ...]

REQUESTS, TOKENS = (
    tuple(b"x-ratelimit-%b-%b" % (what, of) for what in (b"limit", b"remaining", b"reset"))
    for of in (b"requests", b"tokens")
)
LEASE_SECONDS = 30.0
FORGET_EVERY = 30
"""Sweeps."""
MEMBERS_PER_CALL = 500
MOST_TOKENS = 10**12
"""No request has more, and no counter grows beyond what a script can write."""
NEVER = 60
"""Seconds to wait that are told to a request that alone is larger than the limit."""


class Held(AbstractAsyncContextManager["Held"]):
    """A running request as the limits see it. This one is nobody's: the key has no limits, and nothing is counted."""

    __slots__ = ()

    @property
    def headers(self) -> Headers:
        """What the caller is told on success."""
        return ()

    def correct(self, tokens: int) -> None:
        """Count `tokens`, the true total, instead of the estimate. Does not wait."""

    async def __aenter__(self) -> Held:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


UNLIMITED = Held()


class Limits:
    """The limits of all keys, for one process. `workers` processes share them; no I/O before the first hold.

    redis_url: redis://, rediss:// or unix://; empty: this process alone. clock: monotonic seconds.
    lease_seconds: how long a dead process keeps its places.
    """

    def __init__(
        self,
        redis_url: str,
        *,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._link = Link(redis_url, clock=clock) if redis_url else None
        self._workers = max(1, workers)
        self._clock = clock
        self._lease = int(lease_seconds * SECOND)
        self._book = Book()
        process = uuid.uuid4().hex
        self._names = (f"{process}:{number}" for number in itertools.count())
        self._sweeps = 0

    @property
    def local(self) -> bool:
        """Whether this process keeps the limits alone: there is no Redis, or it was given up for the moment."""
        return self._link is None or self._link.open

    @property
    def link(self) -> Link | None:
        """The way to Redis, for others who may go without an answer; None when there is no Redis."""
        return self._link

    def hold(self, caller: Caller, *, member: str, tokens: int) -> AbstractAsyncContextManager[Held]:
        """Count one request of `tokens` (an estimate), and a place among the running ones until the context is left.

        `member` names it for people who look into Redis; it need not be unique, since callers may choose it. Entering
        raises RateLimited or ConcurrencyLimited. One round trip to Redis at the most; none for a key without limits.
        """
        if (
            caller.requests_per_minute is None
            and caller.tokens_per_minute is None
            and caller.max_concurrency is None
        ):
            return UNLIMITED
        return _Counted(self, caller, f"{next(self._names)}:{member:.64}", min(max(1, tokens), MOST_TOKENS))

    async def sweep(self) -> None:
        """Once a second: try a Redis that was given up, renew what runs, hand in what is queued or owed."""
        self._sweeps += 1
        if self._sweeps % FORGET_EVERY == 0:
            self._book.forget_idle(self.now())
        link = self._link
        if link is None or (link.open and not await link.recover()):
            return
        link.send_undelivered()
        for key_id, requests, tokens in self._book.take_owed(self.now()):
            for what, amount in (("r", requests), ("t", tokens)):
                if amount:
                    link.send(call(ADD, _key(key_id, what), words=(amount, -1), again=True))
        for key_id, leased in self._book.leased():
            members = tuple(leased)
            for start in range(0, len(members), MEMBERS_PER_CALL):
                words: Words = (self._lease, *members[start : start + MEMBERS_PER_CALL])
                link.send(call(KEEP, _key(key_id, "c"), words=words))
        await link.flush()

    async def close(self) -> None:
        """Send what is queued and close the connection."""
        if self._link is not None:
            await self._link.close()

    def now(self) -> int:
        return int(self._clock() * SECOND)

    async def _take(self, held: _Counted) -> None:
        caller, link = held.caller, self._link
        held.leased = caller.max_concurrency is not None
        if link is not None and not link.open:
            held.asked = True
            try:
                answer = await link.ask(self._question(held))
                verdict, index, *counts = answer
                held.read(*counts)
            except asyncio.CancelledError:
                self._give_back(held)
                raise
            except (LinkFailed, ValueError, TypeError):
                pass
            else:
                held.remote_minute = index
                self._judge(held, verdict)
                self._enter(held, self.now(), owed=False)
                return
        self._take_locally(held)

    def _question(self, held: _Counted) -> Operation:
        caller, key = held.caller, held.caller.key_id
        limits = (caller.requests_per_minute, caller.tokens_per_minute, caller.max_concurrency)
        numbers = (-1 if limit is None else limit for limit in limits)
        words: Words = (*numbers, held.tokens, held.member, self._lease)
        return call(HOLD, _key(key, "r"), _key(key, "t"), _key(key, "c"), words=words)

    def _take_locally(self, held: _Counted) -> None:
        """The line that decides what happens without Redis: this process grants its share of each limit."""
        now, caller = self.now(), held.caller
        admitted = self._book[caller.key_id].admitted
        held.divisor = self._workers
        held.requests, held.used_tokens = admitted.requests.read(now), admitted.tokens.read(now)
        most = held.share(caller.max_concurrency)
        running = self._book[caller.key_id].running
        verdict = 0
        if not _fits(held.requests, 1, held.share(caller.requests_per_minute)):
            verdict = 1
        elif not _fits(held.used_tokens, held.tokens, held.share(caller.tokens_per_minute)):
            verdict = 2
        elif most is not None and running >= most:
            verdict = 3
        try:
            self._judge(held, verdict)
        except RateLimited:
            self._give_back(held)  # A question that timed out may still have taken a place.
            raise
        self._enter(held, now, owed=self._link is not None)
        held.requests, held.used_tokens = admitted.requests.read(now), admitted.tokens.read(now)

    def _enter(self, held: _Counted, now: int, *, owed: bool) -> None:
        """It runs: note it in this process too, which may have to go on alone."""
        state = held.state = self._book[held.caller.key_id]
        requests = 0 if held.caller.requests_per_minute is None else 1
        tokens = 0 if held.caller.tokens_per_minute is None else held.tokens
        held.minute = state.count(now, requests=requests, tokens=tokens)
        if owed:
            state.owe(now, requests=requests, tokens=tokens)
        state.running += 1
        if held.leased:
            state.leased.add(held.member)

    def _judge(self, held: _Counted, verdict: int) -> None:
        """Raise what the verdict says, with the time after which it would be another one."""
        if verdict == 1:
            limit = held.share(held.caller.requests_per_minute)
            what = f"{held.caller.requests_per_minute} requests per minute"
            raise held.refusal(what, held.requests.wait(1, limit or 0))
        if verdict == 2:
            limit = held.share(held.caller.tokens_per_minute)
            what = f"{held.caller.tokens_per_minute} tokens per minute"
            raise held.refusal(what, held.used_tokens.wait(held.tokens, limit or 0))
        if verdict == 3:
            raise ConcurrencyLimited(
                f"This key has reached its limit of {held.caller.max_concurrency} requests at the same time.",
                retry_after=1,
                headers=held.headers,
            )

    def _give_back(self, held: _Counted) -> None:
        """Free its place in Redis, if it may have one there; what came and went while Redis was away has none."""
        if held.leased and self._link is not None and (held.asked or not self._link.open):
            self._link.send(Operation(("ZREM", _key(held.caller.key_id, "c"), held.member), again=True))

    def _correct(self, held: _Counted, tokens: int) -> None:
        difference, held.tokens = tokens - held.tokens, tokens
        if not difference or held.caller.tokens_per_minute is None:
            return
        now = self.now()
        held.state.admitted.tokens.add(now, difference, held.minute)
        if self._link is None:
            return
        if held.remote_minute is None or self._link.open:
            if difference > 0:
                held.state.owe(now, requests=0, tokens=difference)
            elif held.state.owed is not None:
                held.state.owed.tokens.add(now, difference, held.minute)
            return
        words = (difference, held.remote_minute)
        key = _key(held.caller.key_id, "t")
        self._link.send(call(ADD, key, words=words, again=difference > 0))


class _Counted(Held):
    """A hold of a key that has limits. Afterwards also what its answer and its correction need."""

    __slots__ = (
        "asked", "caller", "divisor", "leased", "limits", "member", "minute", "remote_minute", "requests", "state", "tokens",
        "used_tokens",
    )  # fmt: skip

    def __init__(self, limits: Limits, caller: Caller, member: str, tokens: int) -> None:
        self.limits = limits
        self.caller = caller
        self.member = member.encode(errors="replace")
        self.tokens = tokens
        self.divisor = 1
        self.minute = 0
        self.remote_minute: int | None = None
        self.leased = False
        self.asked = False
        self.state: KeyState
        self.requests: Reading
        self.used_tokens: Reading

    async def __aenter__(self) -> Held:
        await self.limits._take(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.state.running -= 1
        self.state.leased.discard(self.member)
        self.limits._give_back(self)

    @property
    def headers(self) -> Headers:
        found: list[tuple[bytes, bytes]] = []
        for names, limit, reading in (
            (REQUESTS, self.caller.requests_per_minute, self.requests),
            (TOKENS, self.caller.tokens_per_minute, self.used_tokens),
        ):
            if limit is not None:
                remaining = reading.remaining(self.share(limit) or 0)
                values = (b"%d" % limit, b"%d" % remaining, duration(reading.reset()))
                found.extend(zip(names, values, strict=True))
        return tuple(found)

    def correct(self, tokens: int) -> None:
        self.limits._correct(self, min(max(0, tokens), MOST_TOKENS))

    def read(self, elapsed: int, *counts: int) -> None:
        """Take over what Redis counts."""
        requests, requests_before, tokens, tokens_before = counts
        self.requests = Reading(elapsed, requests, requests_before)
        self.used_tokens = Reading(elapsed, tokens, tokens_before)

    def share(self, limit: int | None) -> int | None:
        """What one of the processes may grant of a limit; not nothing, or a small limit would refuse everyone."""
        return limit and max(1, limit // self.divisor)

    def refusal(self, what: str, wait: int | None) -> RateLimited:
        text = f"This key has reached its limit of {what}."
        if wait is None:
            text = f"This request alone is larger than the key's limit of {what}."
        seconds = NEVER if wait is None else max(1, -(-wait // SECOND))
        return RateLimited(text, retry_after=seconds, headers=self.headers)


def _fits(reading: Reading, amount: int, limit: int | None) -> bool:
    return limit is None or reading.fits(amount, limit)


def _key(key_id: str, what: str) -> str:
    return f"penstock:limit:{{{key_id}}}:{what}"
