"""Where workers add up their counts of requests: in Redis a hash for each day, and a list of the newest requests.

Today's and yesterday's (UTC) are kept, so labels that are gone go. What is read is not trusted for anything but being
shown: labels, numbers and texts that we would not have written are passed over (R56).
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from proxy.traffic import Counts, Recent, Row

logger = logging.getLogger(__name__)

PREFIX = "penstock:requests"
RECENT = f"{PREFIX}:recent"
DAY = 86_400
DAYS_KEPT = 2
TIMEOUT = 0.2
REST_SECONDS = 5.0
MOST_RECENT = 100
MOST_BYTES = 2048
MOST_COUNT = 2**53
LABEL = re.compile(r"[A-Z]{2,7} [\x21-\x7e]{1,200}|other")
SLOT = re.compile(r"count|errors|micros|b\d{1,2}")
TEXTS = ("method", "path", "request_id", "user", "gateway_key")
NUMBERS = ("timestamp", "status_code", "duration_ms")


class Store:
    """Waits for Redis some tenths of a second at most; while it is away it is not asked again for some seconds."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._client: redis.Redis | None = None
        self._rests_until = 0.0

    @property
    def exists(self) -> bool:
        return bool(self._url)

    def add(self, counts: Counts) -> bool:
        """Whether Redis took it. If it took it and did not say so in time, it is counted twice."""
        return self._asked(lambda client: _write(client, counts)) is not None

    def read(self, into: Counts) -> Counts | None:
        """The sums of all workers; None while Redis cannot say."""
        return self._asked(lambda client: _read(client, into)) if self._url else None

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _asked(self, question: Callable[[redis.Redis], Any]) -> Any:
        if self._clock() < self._rests_until:
            return None
        try:
            if self._client is None:
                self._client = redis.Redis.from_url(
                    self._url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, protocol=2
                )
            return question(self._client)
        except (redis.RedisError, OSError, ValueError) as error:
            self._rests_until = self._clock() + REST_SECONDS
            logger.info("requests are counted by each process alone: %s", type(error).__name__)
            return None


def _day(now: float) -> str:
    return time.strftime("%Y%m%d", time.gmtime(now))


def _write(client: redis.Redis, counts: Counts) -> bool:
    now = time.time()
    sums, longest = f"{PREFIX}:{_day(now)}", f"{PREFIX}:{_day(now)}:longest"
    with client.pipeline(transaction=True) as pipe:
        pipe.hsetnx(sums, "since", str(counts.since))
        for label, row in counts.rows.items():
            for slot, number in _slots(row):
                pipe.hincrby(sums, f"{label}\n{slot}", number)
        for status, number in counts.statuses.items():
            pipe.hincrby(sums, f"\n{status}", number)
        pipe.zadd(longest, {label: row.most_micros for label, row in counts.rows.items()}, gt=True)
        pipe.lpush(RECENT, *(json.dumps(each) for each in reversed(counts.recent)))
        pipe.ltrim(RECENT, 0, MOST_RECENT - 1)
        for name in (sums, longest, RECENT):
            pipe.expire(name, DAYS_KEPT * DAY)
        pipe.execute()
    return True


def _slots(row: Row) -> Iterator[tuple[str, int]]:
    yield "count", row.count
    yield "micros", row.micros
    if row.errors:
        yield "errors", row.errors
    for index, number in enumerate(row.buckets):
        if number:
            yield f"b{index}", number


def _read(client: redis.Redis, into: Counts) -> Counts:
    now = time.time()
    days = [_day(now - DAY * before) for before in range(DAYS_KEPT)]
    with client.pipeline(transaction=False) as pipe:
        for day in days:
            pipe.hgetall(f"{PREFIX}:{day}")
            pipe.zrange(f"{PREFIX}:{day}:longest", 0, -1, withscores=True)
        pipe.lrange(RECENT, 0, MOST_RECENT - 1)
        *found, recent = pipe.execute()
    for sums in found[::2]:
        _sum_up(sums, into)
    for label, micros in (pair for pairs in found[1::2] for pair in pairs):
        if (row := into.rows.get(_text(label))) is not None and 0 <= micros < MOST_COUNT:
            row.most_micros = max(row.most_micros, int(micros))
    into.recent.extend(each for each in map(_request, recent) if each is not None)
    return into


def _sum_up(sums: Mapping[bytes, bytes], into: Counts) -> None:
    for name, number in sums.items():
        label, _, slot = _text(name).rpartition("\n")
        if label == "since" or slot == "since":
            into.since = min(into.since, _moment(number, into.since))
        elif (count := _count(number)) is None:
            continue
        elif not label and slot.isdecimal() and len(slot) == 3:
            into.statuses[int(slot)] += count
        elif LABEL.fullmatch(label) and SLOT.fullmatch(slot):
            _put(into.row(label), slot, count)


def _put(row: Row, slot: str, count: int) -> None:
    if slot.startswith("b"):
        if int(slot[1:]) < len(row.buckets):
            row.buckets[int(slot[1:])] += count
    else:
        setattr(row, slot, getattr(row, slot) + count)


def _text(value: bytes) -> str:
    return value.decode("ascii", "replace")


def _count(value: bytes) -> int | None:
    return int(value) if value.isdigit() and len(value) <= 16 else None


def _moment(value: bytes, otherwise: float) -> float:
    try:
        moment = float(value)
    except ValueError:
        return otherwise
    return moment if otherwise - DAYS_KEPT * DAY <= moment <= otherwise else otherwise


def _request(value: bytes) -> Recent | None:
    """A request as we write them; None for anything else."""
    try:
        found = json.loads(value[:MOST_BYTES])
        texts = {name: found[name][:200] for name in TEXTS if isinstance(found[name], str)}
        numbers = {name: found[name] for name in NUMBERS if type(found[name]) in (int, float)}
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    whole = len(texts) == len(TEXTS) and len(numbers) == len(NUMBERS)
    bounded = whole and all(0 <= number < MOST_COUNT for number in numbers.values())
    return {**texts, **numbers} if bounded else None  # type: ignore[return-value]  # all of its fields, as checked
