"""Which candidate is dialled next, and when: three dials at the most, somebody else before the same one again.

A provider is asked again only when nobody else is left, after a pause, and only while few requests do so: retries must not
be what keeps a provider from getting up. Numbers are those of Envoy's retry budget.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Self

from providers.errors import (
    ContextLengthExceeded,
    Interrupted,
    ProviderError,
    UpstreamFailed,
    UpstreamModelNotFound,
    UpstreamRateLimited,
)
from proxy.candidates import Candidate
from proxy.errors import GatewayError, RateLimited, UpstreamsLimited

MAX_DIALS = 3
BACKOFF_SECONDS = (0.05, 0.5)
LONGEST_WAIT = 5.0
"""Seconds for which a Retry-After is waited out; a longer one is the caller's to wait for."""
LATENESS = 0.2
"""By which part of it a Retry-After is overstayed at the most, so that not all come back at once; never less (F07)."""


class RetryBudget:
    """The retries of one worker: at most a fifth of the requests that run, and never fewer than three."""

    SHARE, LEAST = 0.2, 3

    def __init__(self, running: Callable[[], int]) -> None:
        self._running = running
        self._taken = 0

    def take(self) -> bool:
        if self._taken >= max(self.LEAST, self.SHARE * self._running()):
            return False
        self._taken += 1
        return True

    def give_back(self) -> None:
        self._taken -= 1


class Journey:
    """The way of one request through its candidates. A context manager: what it took of the retry budget goes back.

    `next()` says whom to dial, `failed()` what came of it. dials: how many there were.
    """

    def __init__(self, candidates: Iterable[Candidate], budget: RetryBudget) -> None:
        self._untried = deque(candidates)
        self._budget = budget
        self._retries = 0
        self._failures: list[tuple[Candidate, ProviderError]] = []
        self._waits: list[float] = []
        self.dials = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _ in range(self._retries):
            self._budget.give_back()

    async def next(self, able: Callable[[Candidate], bool] | None = None) -> Candidate | None:
        """The candidate to dial now, after a pause where it was dialled before; None when nobody is left.

        able: who comes into question at all.
        """
        if self.dials >= MAX_DIALS:
            return None
        while self._untried:
            candidate = self._untried.popleft()
            if able is None or able(candidate):
                self.dials += 1
                return candidate
        again = await self._again(able)
        self.dials += again is not None
        return again

    async def _again(self, able: Callable[[Candidate], bool] | None) -> Candidate | None:
        failures = ((each, error) for each, error in self._failures if error.again)
        found = next((failure for failure in failures if able is None or able(failure[0])), None)
        if found is None:
            return None
        candidate, error = found
        pause = pause_after(error)
        if pause > LONGEST_WAIT or not self._budget.take():
            return None
        self._retries += 1
        self._failures.remove(found)
        await asyncio.sleep(pause)
        return candidate

    def failed(self, candidate: Candidate, error: ProviderError, *, committed: bool = False) -> None:
        """Note a failure, before the next is asked for. Raises the error when nobody else is to be asked.

        committed: the caller has a part of an answer, so that whatever others say of the request, it was a good one.
        """
        self._failures.append((candidate, error))
        if error.blame == "key":
            self._spare(candidate)
        if committed:
            return
        if isinstance(error, ContextLengthExceeded):
            self._untried = deque(each for each in self._untried if _may_be_larger(each, candidate))
            if not self._untried:
                raise error
        elif not error.failover:
            raise error

    def passed_over(self, candidate: Candidate, limited: RateLimited) -> None:
        """The limit of its key left no room for this request: it was not dialled, and has not failed."""
        self.dials -= 1
        self._waits.append(limited.retry_after or 1.0)
        self._spare(candidate)

    def _spare(self, candidate: Candidate) -> None:
        """Next comes the same with another key, if it has one."""
        if candidate.spares:
            spare, *rest = candidate.spares
            self._untried.appendleft(candidate._replace(credential=spare, spares=tuple(rest)))

    def once_more(self, candidate: Candidate) -> None:
        """Dial this one next, for it is asked in another way than before."""
        self._untried.appendleft(candidate)

    def verdict(self) -> ProviderError | GatewayError:
        """One error for all, who gave the caller nothing: 429 and 404 only when every one said so, else the last that is
        neither. An answer that broke off is no broken stream to a caller who never saw it begin. Who was passed over for
        want of room says 429, too, and might have had the model.
        """
        failures = [error for _, error in self._failures]
        others = [
            error for error in failures if not isinstance(error, UpstreamRateLimited | UpstreamModelNotFound)
        ]
        if others and isinstance(others[-1], Interrupted):
            return UpstreamFailed("The provider's answer broke off before it was complete.")
        if others:
            return others[-1]
        limited = [error for error in failures if isinstance(error, UpstreamRateLimited)]
        if self._waits:
            told = [error.retry_after for error in limited if error.retry_after is not None]
            return UpstreamsLimited(retry_after=min(self._waits + told))
        return (limited or failures)[-1]


def pause_after(error: ProviderError) -> float:
    """Seconds before the same provider is asked again: what it said, else somewhere in BACKOFF_SECONDS."""
    if isinstance(error, UpstreamRateLimited) and error.retry_after is not None:
        return error.retry_after * random.uniform(1, 1 + LATENESS)  # noqa: S311  # spreads load, guards nothing
    return random.uniform(*BACKOFF_SECONDS)  # noqa: S311  # as above


def _may_be_larger(one: Candidate, other: Candidate) -> bool:
    return one.window is None or other.window is None or one.window > other.window
