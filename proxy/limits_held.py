"""A running request as the limits see it: what it was counted for, what its caller is told, and why it is refused."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Final

from proxy.errors import ConcurrencyLimited, RateLimited
from proxy.limits_local import SECOND, Reading, Readings, ScopeState, duration
from proxy.scopes import Scopes

if TYPE_CHECKING:
    from proxy.limits import Limits

Headers = tuple[tuple[bytes, bytes], ...]

NAMES = tuple(
    tuple(b"x-ratelimit-%b-%b" % (what, of) for what in (b"limit", b"remaining", b"reset"))
    for of in (b"requests", b"tokens")
)
MOST_TOKENS = 10**12
"""No request has more, and no counter grows beyond what a script can write."""
NEVER = 60
"""Seconds to wait that are told to a request that alone is larger than the limit."""

TAKEN: Final = 0
WINDOW_FULL: Final = 1
PLACES_FULL: Final = 2
"""Verdicts; PLACES_FULL + n is about the places of scope n."""


class Held(AbstractAsyncContextManager["Held"]):
    """A running request as the limits see it. This one is nobody's: nothing limits it, and nothing is counted.

    alone: it was counted in this process alone, so that the same request need not wait for Redis once more.
    """

    __slots__ = ()
    alone = False

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


class Counted(Held):
    """A hold of something that has limits.

    tokens: what is counted for it; shared_tokens: what Redis was told of that. minute, remote_minute: in which it is counted,
    here and in Redis, which is None where Redis did not count it. readings: of each scope's windows, this request included
    once it is taken. divisor: how many processes share the limits at this moment.
    """

    __slots__ = (
        "alone", "asked", "divisor", "left", "limits", "member", "minute", "readings", "remote_minute", "scopes",
        "shared_tokens", "states", "tokens",
    )  # fmt: skip

    def __init__(self, limits: Limits, scopes: Scopes, member: str, tokens: int, alone: bool) -> None:
        self.alone = alone
        self.limits = limits
        self.scopes = scopes
        self.member = member.encode(errors="replace")
        self.tokens = self.shared_tokens = min(max(1, tokens), MOST_TOKENS)
        self.divisor = 1
        self.minute = 0
        self.remote_minute: int | None = None
        self.asked = self.left = False
        self.states: list[ScopeState] = []
        self.readings: list[Readings]

    async def __aenter__(self) -> Held:
        await self.limits._take(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.left = True
        for state in self.states:
            state.running -= 1
            state.leased.discard(self.member)
        self.limits._release(self)

    def correct(self, tokens: int) -> None:
        self.limits._correct(self, min(max(0, tokens), MOST_TOKENS))

    def read(self, elapsed: int, counts: list[int]) -> None:
        """Take over what Redis counts. Raises ValueError when that is not about these scopes."""
        if len(counts) != 4 * len(self.scopes.each):
            raise ValueError
        self.readings = [
            (Reading(elapsed, counts[n], counts[n + 1]), Reading(elapsed, counts[n + 2], counts[n + 3]))
            for n in range(0, len(counts), 4)
        ]

    def share(self, limit: int) -> int:
        """What one of the processes may grant of a limit; not nothing, or a small limit would refuse everyone."""
        return limit and max(1, limit // self.divisor)

    @property
    def headers(self) -> Headers:
        """Limit, remaining and reset of the scope that leaves the least, for requests and for tokens."""
        found: list[tuple[bytes, bytes]] = []
        for what, names in enumerate(NAMES):
            told = self._tightest(what)
            if told is not None:
                limit, remaining, reset = names
                found += (limit, b"%d" % told[2]), (remaining, b"%d" % told[0]), (reset, duration(-told[1]))
        return tuple(found)

    def _tightest(self, what: int) -> tuple[int, int, int] | None:
        """What remains, until when (negative), and the limit, of requests (0) or tokens (1); None where they are not limited."""
        told: tuple[int, int, int] | None = None
        for scope, readings in zip(self.scopes.each, self.readings, strict=True):
            limit = scope.numbers[what]
            if limit >= 0:
                reading = readings[what]
                mine = reading.remaining(self.share(limit)), -reading.reset(), limit
                told = mine if told is None else min(told, mine)
        return told

    def judge(self, verdict: int) -> None:
        """Raise what the verdict says, with the time after which it would be another one."""
        if verdict == TAKEN:
            return
        if verdict == WINDOW_FULL:
            raise self._refusal()
        scope = self.scopes.each[verdict - PLACES_FULL]
        raise ConcurrencyLimited(
            f"{_capital(scope.text)} has reached its limit of {scope.running} requests at the same time.",
            retry_after=1,
            headers=self.headers,
        )

    def verdict(self) -> int:
        """As the script in Redis judges, of what this process counts and its share of each limit."""
        for scope, readings in zip(self.scopes.each, self.readings, strict=True):
            for limit, reading, amount in zip(scope.numbers[:2], readings, (1, self.tokens), strict=True):
                if limit >= 0 and not reading.fits(amount, self.share(limit)):
                    return WINDOW_FULL
        for n, (scope, state) in enumerate(zip(self.scopes.each, self.states, strict=True)):
            if scope.running is not None and state.running >= self.share(scope.running):
                return PLACES_FULL + n
        return TAKEN

    def _refusal(self) -> RateLimited:
        """By the window that has to be waited for the longest, since all of them must have room."""
        longest, text = -1, ""
        for scope, readings in zip(self.scopes.each, self.readings, strict=True):
            asked = ((1, "requests"), (self.tokens, "tokens"))
            for limit, reading, (amount, what) in zip(scope.numbers[:2], readings, asked, strict=True):
                if limit < 0:
                    continue
                wait = reading.wait(amount, self.share(limit))
                if wait is None:
                    text = f"This request alone is larger than the limit of {limit} {what} per minute of {scope.text}."
                    return RateLimited(text, retry_after=NEVER, headers=self.headers)
                if wait > longest:
                    longest = wait
                    text = f"{_capital(scope.text)} has reached its limit of {limit} {what} per minute."
        return RateLimited(text, retry_after=max(1, -(-longest // SECOND)), headers=self.headers)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
