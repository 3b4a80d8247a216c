"""What workers tell each other through Redis: whose circuit is open, and which keys rest.

One hash has a field for each worker that has anything to tell. It is hearsay: it steers requests away from a provider, for
300 s at the most, and can do nothing else; whatever does not look like it is passed over (R56). Without Redis each
worker knows what it saw itself.
"""

from __future__ import annotations

import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import redis

logger = logging.getLogger(__name__)

HASH = "penstock:weather"
MOST_SECONDS = 300.0
MOST_BYTES = 64 * 1024
STALE_SECONDS = 5.0
"""A worker that has told nothing new for so long is dead, or cut off."""
GONE_SECONDS = 60.0
TIMEOUT = 0.2
REST_SECONDS = 5.0

NONE: Mapping[int, float] = {}


@dataclass(frozen=True, slots=True)
class Hearsay:
    """circuits: by provider; keys: by what `Cooldowns` know them as; both for how many seconds more from `at` on."""

    circuits: Mapping[int, float] = field(default_factory=dict)
    keys: Mapping[int, float] = field(default_factory=dict)
    at: float = 0.0

    def __bool__(self) -> bool:
        return bool(self.circuits or self.keys)

    def left(self, now: float) -> tuple[Mapping[int, float], Mapping[int, float]]:
        """Circuits and keys at the moment `now`."""
        return _later(self.circuits, now - self.at), _later(self.keys, now - self.at)


def _later(seconds: Mapping[int, float], passed: float) -> Mapping[int, float]:
    return {each: left - passed for each, left in seconds.items() if left > passed}


class Grapevine:
    """The way of one worker to all others. `swap` waits for Redis, at most some tenths of a second, so it has its own thread."""

    def __init__(self, url: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = url
        self._clock = clock
        self._worker = uuid.uuid4().hex
        self._client: redis.Redis | None = None
        self._round = 0
        self._told = False
        self._rests_until = 0.0
        self._heard_of: dict[bytes, tuple[bytes, float]] = {}

    def swap(self, ours: Hearsay) -> Hearsay:
        """Tell what we saw, hear what others did. Nothing while Redis is away, which is not asked again for some seconds."""
        if not self._url or self._clock() < self._rests_until:
            return Hearsay()
        try:
            return self._understood(self._exchange(ours))
        except (redis.RedisError, OSError, ValueError) as error:
            self._rests_until = self._clock() + REST_SECONDS
            logger.info("workers do not hear of each other: %s", type(error).__name__)
            return Hearsay()

    def close(self) -> None:
        if self._client is not None:
            self._client.close()

    def _exchange(self, ours: Hearsay) -> Mapping[bytes, bytes]:
        client = self._client = self._client or _client(self._url)
        if not ours and not self._told:
            return _rows(client.hgetall(HASH))
        self._round += 1
        with client.pipeline(transaction=False) as pipe:
            if ours:
                told = {"n": self._round, "c": _keyed(ours.circuits), "k": _keyed(ours.keys)}
                pipe.hset(HASH, self._worker, json.dumps(told))
                pipe.expire(HASH, int(GONE_SECONDS))
            else:
                pipe.hdel(HASH, self._worker)
            pipe.hgetall(HASH)
            rows = pipe.execute()[-1]
        self._told = bool(ours)
        return _rows(rows)

    def _understood(self, rows: Mapping[bytes, bytes]) -> Hearsay:
        now = self._clock()
        circuits: dict[int, float] = {}
        keys: dict[int, float] = {}
        self._heard_of = {worker: known for worker, known in self._heard_of.items() if worker in rows}
        for worker, text in rows.items():
            if worker == self._worker.encode() or not self._is_alive(worker, text, now):
                continue
            told = _told(text)
            for into, name in ((circuits, "c"), (keys, "k")):
                for each, seconds in _seconds(told.get(name)):
                    into[each] = max(seconds, into.get(each, 0.0))
        return Hearsay(circuits, keys, now)

    def _is_alive(self, worker: bytes, text: bytes, now: float) -> bool:
        """Whether it has told something new lately; no clock but ours takes part in that."""
        known, since = self._heard_of.get(worker, (b"", now))
        if known != text:
            since = now
        self._heard_of[worker] = (text, since)
        if now - since > GONE_SECONDS and self._client is not None:
            self._client.hdel(HASH, worker.decode("latin-1"))
        return now - since < STALE_SECONDS


def _client(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT, protocol=2)


def _rows(answer: Any) -> Mapping[bytes, bytes]:
    found = answer if isinstance(answer, dict) else {}
    return {
        worker: text for worker, text in found.items() if isinstance(text, bytes) and len(text) <= MOST_BYTES
    }


def _keyed(seconds: Mapping[int, float]) -> dict[str, float]:
    return {str(each): round(left, 1) for each, left in seconds.items()}


def _told(text: bytes) -> Mapping[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return told if isinstance(told, dict) else {}


def _seconds(told: Any) -> list[tuple[int, float]]:
    """The pairs that make sense."""
    if not isinstance(told, dict):
        return []
    return [
        (int(each), min(float(left), MOST_SECONDS))
        for each, left in told.items()
        if each.removeprefix("-").isdecimal()
        and len(each) < 19
        and type(left) in (int, float)
        and 0 < left < 1e9
    ]
