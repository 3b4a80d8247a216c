"""How much may be done: requests and tokens a minute, and requests at the same time, by a key, its owner, a provider's key.

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

from proxy.errors import RateLimited
from proxy.limits_held import UNLIMITED, Counted, Held
from proxy.limits_local import SECOND, WINDOW, Book
from proxy.limits_lua import HOLD, KEEP, RELEASE
from proxy.limits_redis import Link, LinkFailed, Operation, Words, call
from proxy.scopes import Scopes, redis_key

__all__ = ["UNLIMITED", "Held", "Limits"]

LEASE_SECONDS = 30.0
FORGET_EVERY = 30
"""Sweeps."""
MEMBERS_PER_CALL = 500


class Limits:
    """The limits of all scopes, for one process. `workers` processes share them; no I/O before the first hold or sweep.

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

    def hold(
        self, scopes: Scopes | None, *, member: str, tokens: int, alone: bool = False
    ) -> AbstractAsyncContextManager[Held]:
        """Count one request of `tokens` (an estimate), and a place among the running ones until the context is left.

        It is counted for all of the scopes or for none. `member` names it for people who look into Redis; it need not be
        unique, since callers may choose it. Entering raises RateLimited or ConcurrencyLimited. One round trip to Redis at the
        most; none without scopes, or when it is to be counted `alone`.
        """
        if scopes is None:
            return UNLIMITED
        return Counted(self, scopes, f"{next(self._names)}:{member:.64}", tokens, alone)

    async def sweep(self) -> None:
        """Once a second: try a Redis that was given up or that nobody has asked, renew what runs, hand in what is queued or owed."""
        self._sweeps += 1
        if self._sweeps % FORGET_EVERY == 0:
            self._book.forget_idle(self.now())
        link = self._link
        if link is None or (link.open and not await link.recover()):
            return
        link.send_undelivered()
        for name, requests, tokens in self._book.take_owed(self.now()):
            for what, amount in (("r", requests), ("t", tokens)):
                if amount:
                    link.send(_release((redis_key(name, what),), amount))
        for name, leased in self._book.leased():
            members = tuple(leased)
            for start in range(0, len(members), MEMBERS_PER_CALL):
                words: Words = (self._lease, *members[start : start + MEMBERS_PER_CALL])
                link.send(call(KEEP, redis_key(name, "c"), words=words))
        await link.look()
        await link.flush()

    async def close(self) -> None:
        """Send what is queued and close the connection."""
        if self._link is not None:
            await self._link.close()

    def now(self) -> int:
        return int(self._clock() * SECOND)

    # -- what a hold asks for ----------------------------------------------------------------------------------------

    async def _take(self, held: Counted) -> None:
        link = self._link
        if link is not None and not link.open and not held.alone:
            held.asked = True
            try:
                verdict, index, elapsed, *counts = await link.ask(self._question(held))
                held.read(elapsed, counts)
            except asyncio.CancelledError:
                self._release(held)
                raise
            except (LinkFailed, ValueError, TypeError):
                pass
            else:
                held.remote_minute = index
                held.judge(verdict)
                self._enter(held, self.now(), owed=False)
                return
        self._take_locally(held)

    def _question(self, held: Counted) -> Operation:
        scopes = held.scopes
        return call(HOLD, *scopes.keys, words=(held.tokens, held.member, self._lease, *scopes.numbers))

    def _take_locally(self, held: Counted) -> None:
        """The line that decides what happens without Redis: this process grants its share of each limit."""
        now, held.divisor, held.alone = self.now(), self._workers, True
        states = held.states = [self._book[scope.name] for scope in held.scopes.each]
        held.readings = [state.admitted.read(now) for state in states]
        try:
            held.judge(held.verdict())
        except RateLimited:
            self._release(held)  # A question that timed out may still have taken a place.
            raise
        self._enter(held, now, owed=self._link is not None)
        held.readings = [state.admitted.read(now) for state in states]

    def _enter(self, held: Counted, now: int, *, owed: bool) -> None:
        """It runs: note it in this process too, which may have to go on alone."""
        held.minute = now // WINDOW
        held.states = [self._book[scope.name] for scope in held.scopes.each]
        for scope, state in zip(held.scopes.each, held.states, strict=True):
            requests = 0 if scope.requests is None else 1
            tokens = 0 if scope.tokens is None else held.tokens
            state.admitted.add(now, requests=requests, tokens=tokens)
            if owed:
                state.owe(now, requests=requests, tokens=tokens)
            state.running += 1
            if scope.running is not None:
                state.leased.add(held.member)

    def _correct(self, held: Counted, tokens: int) -> None:
        """Here at once; Redis is told with the place that the request gives back."""
        difference, held.tokens = tokens - held.tokens, tokens
        if difference:
            now = self.now()
            for scope, state in zip(held.scopes.each, held.states, strict=True):
                if scope.tokens is not None:
                    state.admitted.tokens.add(now, difference, held.minute)
        if held.left:
            self._release(held)

    def _release(self, held: Counted) -> None:
        """Tell Redis, in one command, the tokens that it did not count and the places that are free again."""
        link = self._link
        if link is None:
            return
        difference, held.shared_tokens = held.tokens - held.shared_tokens, held.tokens
        if difference and (held.remote_minute is None or link.open):
            self._owe(held, difference)
            difference = 0
        windows = held.scopes.windows if difference else ()
        # What came and went while Redis was away has no place there.
        places = held.scopes.places if held.asked or not link.open else ()
        if windows or places:
            link.send(_release(windows, difference, held.remote_minute, places, held.member))

    def _owe(self, held: Counted, difference: int) -> None:
        now = self.now()
        for scope, state in zip(held.scopes.each, held.states, strict=True):
            if scope.tokens is None:
                continue
            if difference > 0:
                state.owe(now, requests=0, tokens=difference)
            elif state.owed is not None:
                state.owed.tokens.add(now, difference, held.minute)


def _release(
    windows: tuple[str, ...],
    amount: int,
    minute: int | None = None,
    places: tuple[str, ...] = (),
    member: bytes = b"",
) -> Operation:
    """Count `amount` in the windows and free the places. Only what may be done twice is sent again after a failure: counting
    too much is safe, giving back twice is not."""
    operation = call(
        RELEASE, *windows, *places, words=(amount, -1 if minute is None else minute, len(windows), member)
    )
    if amount >= 0:
        operation.again = operation.words
    elif places:
        operation.again = call(RELEASE, *places, words=(0, -1, 0, member)).words
    return operation
