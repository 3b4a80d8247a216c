"""Keys that their provider asked to leave alone for a while (429), one record for each key and worker.

A key that rests ejects neither its provider nor the provider's other keys, and is no failure of anybody (F07).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

FIRST_SECONDS = 1.0
"""Without a Retry-After; doubled each time in a row."""
MOST_UNTOLD_SECONDS = 30.0
MOST_SECONDS = 300.0

NONE: Mapping[int, float] = {}


@dataclass(slots=True)
class _Rest:
    until: float
    in_a_row: int


class Cooldowns:
    """By key; a provider that is dialled without one is known by its own id, negative."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._rests: dict[int, _Rest] = {}

    def resting(self) -> Mapping[int, float]:
        """What is left alone at this moment, and for how many seconds more."""
        if not self._rests:
            return NONE
        now = self._clock()
        # The watcher's thread asks, too: what it walks must not change under it.
        return {each: rest.until - now for each, rest in list(self._rests.items()) if rest.until > now}

    def limited(self, key: int, retry_after: float | None) -> float:
        """Its provider said 429, and perhaps for how many seconds; for how many it is left alone."""
        now = self._clock()
        known = self._rests.get(key)
        in_a_row = known.in_a_row if known is not None else 0
        # Who is refused while the key rests already was on his way before; only after a rest is it once more.
        if known is None or known.until <= now:
            in_a_row += 1
        untold = min(FIRST_SECONDS * 2.0 ** min(in_a_row - 1, 10), MOST_UNTOLD_SECONDS)
        seconds = untold if retry_after is None else min(max(retry_after, FIRST_SECONDS), MOST_SECONDS)
        until = now + seconds
        self._rests[key] = _Rest(max(until, known.until if known is not None else until), in_a_row)
        return seconds

    def accepted(self, key: int) -> None:
        if self._rests:
            self._rests.pop(key, None)
