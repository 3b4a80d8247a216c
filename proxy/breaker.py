"""Circuit breakers, one per provider and worker: five failures in a row, and it is left alone for a while.

Numbers are Envoy's outlier detection defaults: 5 consecutive failures, 30 s times the number of ejections, at most 300 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

FAILURES = 5
OPEN_SECONDS = 30.0
MOST_SECONDS = 300.0


NONE: frozenset[int] = frozenset()


@dataclass(slots=True)
class _State:
    failures: int = 0
    openings: int = 0
    open_until: float = 0.0


class Breakers:
    """`allows` before dialling, `succeeded` or `failed` after. Half-open: when the time is up, one request tries."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[int, _State] = {}

    def allows(self, provider_id: int) -> bool:
        state = self._states.get(provider_id)
        return state is None or state.open_until <= self._clock()

    def trying(self, provider_id: int) -> None:
        """A request is about to dial: when the circuit is half-open, others wait for its result."""
        state = self._states.get(provider_id)
        if state is not None and state.failures >= FAILURES:
            state.open_until = self._clock() + OPEN_SECONDS

    def succeeded(self, provider_id: int) -> None:
        self._states.pop(provider_id, None)

    def failed(self, provider_id: int) -> None:
        state = self._states.setdefault(provider_id, _State())
        state.failures += 1
        if state.failures >= FAILURES:
            state.openings += 1
            state.open_until = self._clock() + min(OPEN_SECONDS * state.openings, MOST_SECONDS)

    def open(self) -> frozenset[int]:
        """The providers that are left alone at this moment."""
        if not self._states:
            return NONE
        now = self._clock()
        return frozenset(each for each, state in self._states.items() if state.open_until > now)
