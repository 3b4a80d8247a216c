"""The arithmetic of the sliding windows, and what one process remembers of each scope.

A window of 60 s slides as two fixed halves of its history: what was counted in the current minute, and what was counted in
the minute before, weighted by how much of it is still inside. The Lua script in limits_lua computes the same. Times are
whole microseconds, so that both come to the same answer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

SECOND = 1_000_000
WINDOW = 60 * SECOND


class Reading(NamedTuple):
    """A window at one moment: `elapsed` of the current minute, what it counted, and what the minute before counted."""

    elapsed: int
    current: int
    previous: int

    def fits(self, amount: int, limit: int) -> bool:
        return self.previous * (WINDOW - self.elapsed) + (self.current + amount) * WINDOW <= limit * WINDOW

    def remaining(self, limit: int) -> int:
        weighted = self.previous * (WINDOW - self.elapsed) + self.current * WINDOW
        return max(0, limit - -(-weighted // WINDOW))

    def wait(self, amount: int, limit: int) -> int | None:
        """Until `amount` fits if nothing else comes; None when it never will."""
        if amount > limit:
            return None
        room = limit - amount - self.current
        if room >= 0:  # The minute before only has to fade a little more.
            if self.previous <= room:
                return 0
            return max(0, WINDOW - room * WINDOW // self.previous - self.elapsed)
        # This minute is full: it has to become the minute before, and then to fade.
        return (WINDOW - self.elapsed) + WINDOW - (limit - amount) * WINDOW // self.current

    def reset(self) -> int:
        """Until the window is empty if nothing else comes."""
        if self.current:
            return 2 * WINDOW - self.elapsed
        return WINDOW - self.elapsed if self.previous else 0


Readings = tuple[Reading, Reading]
"""Of requests and of tokens."""


@dataclass(slots=True)
class Window:
    """A counter of this process. `index` is the number of the current minute since the clock began."""

    index: int = 0
    current: int = 0
    previous: int = 0

    def read(self, now: int) -> Reading:
        self._roll(now)
        return Reading(now % WINDOW, self.current, self.previous)

    def add(self, now: int, amount: int, index: int | None = None) -> None:
        """Count `amount`. A negative one is taken out of the minute `index` it was once counted in, if that still matters."""
        self._roll(now)
        if amount >= 0 or index == self.index:
            self.current = max(0, self.current + amount)
        elif index == self.index - 1:
            self.previous = max(0, self.previous + amount)

    def empty(self, now: int) -> bool:
        self._roll(now)
        return not (self.current or self.previous)

    def _roll(self, now: int) -> None:
        index = now // WINDOW
        if index != self.index:
            self.previous = self.current if index == self.index + 1 else 0
            self.current = 0
            self.index = index


@dataclass(slots=True)
class Usage:
    """Requests and tokens of one scope."""

    requests: Window = field(default_factory=Window)
    tokens: Window = field(default_factory=Window)

    def add(self, now: int, *, requests: int, tokens: int) -> None:
        self.requests.add(now, requests)
        self.tokens.add(now, tokens)

    def read(self, now: int) -> Readings:
        return self.requests.read(now), self.tokens.read(now)

    def empty(self, now: int) -> bool:
        return self.requests.empty(now) and self.tokens.empty(now)


@dataclass(slots=True)
class ScopeState:
    """What this process did for one scope.

    admitted: everything it let in, so that it can go on by itself from one request to the next.
    owed: the part of it that Redis has not counted. leased: members Redis should know to be running.
    """

    admitted: Usage = field(default_factory=Usage)
    owed: Usage | None = None
    running: int = 0
    leased: set[bytes] = field(default_factory=set)

    def owe(self, now: int, *, requests: int, tokens: int) -> None:
        """Note what Redis has not counted."""
        self.owed = self.owed or Usage()
        self.owed.add(now, requests=requests, tokens=tokens)


class Book:
    """The states of all scopes this process has lately seen, by name."""

    def __init__(self) -> None:
        self._states: dict[str, ScopeState] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, name: str) -> ScopeState:
        state = self._states.get(name)
        if state is None:
            state = self._states[name] = ScopeState()
        return state

    def leased(self) -> Iterator[tuple[str, set[bytes]]]:
        return ((name, state.leased) for name, state in self._states.items() if state.leased)

    def take_owed(self, now: int) -> Iterator[tuple[str, int, int]]:
        """Name, requests and tokens that Redis has not counted and that still matter. They are owed no longer."""
        for name, state in self._states.items():
            owed, state.owed = state.owed, None
            if owed is not None and not owed.empty(now):
                requests, tokens = owed.read(now)
                yield name, _weighted(requests), _weighted(tokens)

    def forget_idle(self, now: int) -> None:
        """Drop the scopes that run nothing and have empty windows."""
        idle = [
            name for name, state in self._states.items() if not state.running and state.admitted.empty(now)
        ]
        for name in idle:
            del self._states[name]


def duration(microseconds: int) -> bytes:
    """Whole seconds as OpenAI writes them: 1s, 6m0s."""
    minutes, seconds = divmod(-(-microseconds // SECOND), 60)
    return b"%dm%ds" % (minutes, seconds) if minutes else b"%ds" % seconds


def _weighted(reading: Reading) -> int:
    return reading.current + reading.previous * (WINDOW - reading.elapsed) // WINDOW
