"""Requests as they were answered, counted by path: what the console shows of them, not what is billed (that is the usage log).

A request leaves one entry in a queue of its process and nothing else: no lock, no Redis, no arithmetic. Once a second a
thread counts the queue and adds the sums to those that all workers share (`traffic_store`). Labels are patterns of paths, so
nobody outside can make new ones.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypedDict

from proxy.traffic_store import Store

BOUNDS_MS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000)
"""Upper ends of the buckets that durations are counted in; the last bucket has no end."""
BUCKETS = len(BOUNDS_MS) + 1
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "WS"})
OTHER = "other"
CLIENT_LEFT = 499
"""What is counted where the caller left before anything was answered."""
MOST_LABELS = 500
MOST_RECENT = 100
MOST_WAITING = 20_000
"""Requests that wait to be counted; far more than a worker answers in a second. What is above is not counted."""


class Recent(TypedDict):
    """One request. `path` is the pattern it matched; timestamp: seconds since 1970; user, gateway_key: empty when nobody was known."""

    timestamp: float
    method: str
    path: str
    status_code: int
    duration_ms: float
    request_id: str
    user: str
    gateway_key: str


Noted = tuple[str, str, int, float, float, str, str, str]
"""A request in the queue: route, method, status, when it began and ended (monotonic clock), request id, user, gateway key."""


@dataclass(slots=True)
class Row:
    """What the requests of one label come to."""

    count: int = 0
    errors: int = 0
    micros: int = 0
    most_micros: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def add(self, seconds: list[float], *, failed: bool) -> None:
        """Requests that took so long."""
        seconds.sort()
        self.count += len(seconds)
        self.errors += len(seconds) * failed
        self.micros += round(sum(seconds) * 1_000_000)
        self.most_micros = max(self.most_micros, round(seconds[-1] * 1_000_000))
        ends = [*(bisect_right(seconds, bound / 1000) for bound in BOUNDS_MS), len(seconds)]
        for index, (before, end) in enumerate(pairwise([0, *ends])):
            self.buckets[index] += end - before

    def join(self, other: Row) -> None:
        self.count += other.count
        self.errors += other.errors
        self.micros += other.micros
        self.most_micros = max(self.most_micros, other.most_micros)
        self.buckets = [a + b for a, b in zip(self.buckets, other.buckets, strict=True)]

    def quantile_ms(self, share: float) -> float:
        """By straight lines within a bucket, and never above the longest."""
        wanted, passed, most = share * self.count, 0, self.most_micros / 1000
        for index, inside in enumerate(self.buckets):
            if inside and passed + inside >= wanted:
                low = BOUNDS_MS[index - 1] if index else 0
                high = min(BOUNDS_MS[index], most) if index < len(BOUNDS_MS) else most
                return max(low, low + (high - low) * (wanted - passed) / inside) if high > low else high
            passed += inside
        return most


@dataclass(slots=True)
class Counts:
    """Sums by label ("GET /api/v1/servers") and by status, and the newest requests, the newest first. since: seconds since 1970."""

    since: float
    rows: dict[str, Row] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)
    recent: deque[Recent] = field(default_factory=lambda: deque(maxlen=MOST_RECENT))

    def __bool__(self) -> bool:
        return bool(self.rows)

    def row(self, label: str) -> Row:
        found = self.rows.get(label)
        if found is None:
            if len(self.rows) >= MOST_LABELS:
                label = OTHER
            found = self.rows.setdefault(label, Row())
        return found

    def join(self, other: Counts) -> None:
        self.since = min(self.since, other.since)
        for label, row in other.rows.items():
            self.row(label).join(row)
        self.statuses.update(other.statuses)
        self.recent.extendleft(reversed(other.recent))

    def total(self) -> Row:
        total = Row()
        for row in self.rows.values():
            total.join(row)
        return total


class Traffic:
    """This process's share, and the way to what all workers counted. redis_url: empty, and each process knows its own."""

    def __init__(self, redis_url: str = "") -> None:
        self._noted: deque[Noted] = deque(maxlen=MOST_WAITING)
        self._store = Store(redis_url)
        self._own = Counts(time.time())
        self._untold = Counts(time.time())
        self._counting = (
            threading.Lock()
        )  # Between those who count and read; whoever notes a request takes none.

    def note(
        self,
        route: str,
        method: str,
        status: int,
        began: float,
        request_id: str,
        user: str = "",
        gateway_key: str = "",
    ) -> None:
        """A request has ended. On the hot path: it appends to a queue, and that is all."""
        self._noted.append((route, method, status, began, time.monotonic(), request_id, user, gateway_key))

    def publish(self) -> None:
        """Count what was noted, and tell the others; once a second, in a thread. What Redis does not take is told later."""
        with self._counting:
            self._publish()

    def read(self) -> tuple[Counts, bool]:
        """What there is to know now, and whether all workers share it; others tell theirs within a second."""
        with self._counting:
            self._publish()
            shared = self._store.read(Counts(time.time()))
            return (self._copy(), False) if shared is None else (shared, True)

    def close(self) -> None:
        self.publish()
        self._store.close()

    def _publish(self) -> None:
        batch = counted(self._taken())
        self._own.join(batch)
        if self._store.exists:
            self._untold.join(batch)
            if self._untold and self._store.add(self._untold):
                self._untold = Counts(time.time())

    def _taken(self) -> list[Noted]:
        return [self._noted.popleft() for _ in range(len(self._noted))]

    def _copy(self) -> Counts:
        copy = Counts(self._own.since)
        copy.join(self._own)
        return copy


def counted(noted: Sequence[Noted]) -> Counts:
    """The sums of these requests. They are sorted into groups first: per request that is all that is done in Python."""
    wall, mono = time.time(), time.monotonic()
    counts = Counts(wall)
    groups: defaultdict[tuple[Any, ...], list[float]] = defaultdict(list)
    for each in noted:
        groups[each[:3]].append(each[4] - each[3])
    for (route, method, status), seconds in groups.items():
        counts.row(_label(method, route)).add(seconds, failed=status >= 400)
        counts.statuses[status] += len(seconds)
    for route, method, status, began, ended, request_id, user, key in noted[: -MOST_RECENT - 1 : -1]:
        counts.recent.append(
            Recent(
                timestamp=round(wall - (mono - ended), 3),
                method=_known(method),
                path=route,
                status_code=status,
                duration_ms=round((ended - began) * 1000, 1),
                request_id=request_id,
                user=user,
                gateway_key=key,
            )
        )
    return counts


def _label(method: str, route: str) -> str:
    return f"{_known(method)} {route}"


def _known(method: str) -> str:
    return method if method in METHODS else "OTHER"


def per_status(statuses: Mapping[int, int]) -> dict[str, int]:
    return {str(status): statuses[status] for status in sorted(statuses)}
