"""Circuit breakers, one per provider and worker: five failures in a row, and it is left alone for a while.

Numbers are Envoy's outlier detection defaults: 5 consecutive failures, 30 s times the number of ejections, at most 300 s.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FAILURES = 5
OPEN_SECONDS = 30.0
MOST_SECONDS = 300.0
TRIAL_SECONDS = 1.0
"""Between two forced trials of a provider that nobody else can stand in for."""

RECOVERY_SECONDS = 10.0
"""So long a circuit stays open whatever a probe says: what answers probes may still fail at what it is for."""

NONE: Mapping[int, float] = {}


@dataclass(slots=True)
class _State:
    failures: int = 0
    openings: int = 0
    open_until: float = 0.0
    opened_at: float = 0.0
    tried_at: float = float("-inf")
    on_trial: bool = False


class Breakers:
    """`open` before dialling, `trying` when dialling, `succeeded` or `failed` after.

    Half-open: when the time is up, one request tries while the others still stay away.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._states: dict[int, _State] = {}

    def open(self) -> Mapping[int, float]:
        """The providers that are left alone at this moment, and for how many seconds more."""
        if not self._states:
            return NONE
        now = self._clock()
        # The watcher's thread asks, too: what it walks must not change under it.
        states = list(self._states.items())
        return {each: state.open_until - now for each, state in states if state.open_until > now}

    def opened(self) -> Mapping[int, float]:
        """The providers whose circuit has been open for RECOVERY_SECONDS, and since how many seconds."""
        now = self._clock()
        ages = ((each, now - state.opened_at) for each, state in list(self._states.items()) if state.openings)
        return {each: age for each, age in ages if age >= RECOVERY_SECONDS}

    def trying(self, provider_id: int) -> None:
        """A request is about to dial: when the circuit is half-open, others wait for its result."""
        state = self._states.get(provider_id)
        if state is not None and state.failures >= FAILURES:
            state.tried_at, state.on_trial = self._clock(), True
            state.open_until = max(state.open_until, state.tried_at + OPEN_SECONDS)

    def may_force(self, provider_id: int) -> bool:
        """Whether an open circuit may be tried all the same, since there is nobody else: not more often than each second."""
        state = self._states.get(provider_id)
        return state is None or self._clock() - state.tried_at >= TRIAL_SECONDS

    def succeeded(self, provider_id: int) -> None:
        self._states.pop(provider_id, None)

    def failed(self, provider_id: int) -> None:
        state = self._states.setdefault(provider_id, _State())
        state.failures += 1
        now = self._clock()
        under_way = state.open_until > now and not state.on_trial
        if state.failures >= FAILURES and not under_way:
            # What was under way when the circuit opened says nothing new; else a burst would open it for minutes.
            state.on_trial = False
            state.openings += 1
            state.opened_at = now
            state.open_until = now + min(OPEN_SECONDS * state.openings, MOST_SECONDS)

    def called_off(self, provider_id: int) -> None:
        """The one who tried was ended before it knew anything: the next may try soon."""
        state = self._states.get(provider_id)
        if state is not None and state.on_trial:
            state.on_trial = False
            state.open_until = self._clock() + TRIAL_SECONDS

    def recovered(self, provider_id: int) -> None:
        """A probe found it well after its circuit had opened: the next request may try."""
        state = self._states.get(provider_id)
        if state is not None and provider_id in self.opened():
            state.open_until = self._clock()
