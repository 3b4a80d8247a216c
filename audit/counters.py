"""Counting requests for the control plane's throttle: in Redis for all processes, and in this one while Redis is away.

A window slides as the current one of two fixed windows, plus of the one before what is still inside. Nothing in Redis grants
anything: whoever can write there could at most lift the throttle.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from redis import Redis, RedisError

logger = logging.getLogger(__name__)

TIMEOUT = 0.05
REST_SECONDS = 5.0
"""After a failure, Redis is left alone for so long."""
MAX_NAMES = 10_000


class Counters:
    """redis_url: redis://, rediss:// or unix://; empty: this process alone. clock: epoch seconds."""

    def __init__(self, redis_url: str, *, clock: Callable[[], float] = time.time) -> None:
        self._redis = (
            Redis.from_url(redis_url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT)
            if redis_url
            else None
        )
        self._clock = clock
        self._rest_until = 0.0
        self._local: dict[str, int] = {}
        self._lock = threading.Lock()

    def take(self, name: str, *, limit: int, window: int) -> float | None:
        """Count one for `name`; None when it is within `limit` in `window` seconds, else the seconds until it would be."""
        index, elapsed = divmod(self._clock(), window)
        current, before = f"{name}:{int(index)}", f"{name}:{int(index) - 1}"
        count, previous = self._add(current, 1, window, before)
        fading = 1 - elapsed / window
        if count + previous * fading <= limit:
            return None
        self._add(current, -1, window, before)
        return _wait(count - 1, previous, limit=limit, window=window, elapsed=elapsed)

    def _add(self, name: str, amount: int, window: int, before: str) -> tuple[int, int]:
        """The count of `name` after it has grown by `amount`, and that of the window before."""
        if self._redis is not None and time.monotonic() >= self._rest_until:
            try:
                with self._redis.pipeline() as pipe:
                    pipe.incrby(f"penstock:throttle:{name}", amount)
                    pipe.expire(f"penstock:throttle:{name}", 2 * window)
                    pipe.get(f"penstock:throttle:{before}")
                    count, _, previous = pipe.execute()
                return int(count), int(previous or 0)
            except (RedisError, ValueError, TypeError) as error:
                self._rest_until = time.monotonic() + REST_SECONDS
                logger.warning("the throttle counts in this process for now: %s", type(error).__name__)
        with self._lock:
            if len(self._local) > MAX_NAMES:
                self._local.clear()
            count = self._local[name] = max(0, self._local.get(name, 0) + amount)
            return count, self._local.get(before, 0)


def _wait(count: int, previous: int, *, limit: int, window: int, elapsed: float) -> float:
    """Seconds until one more would fit if nothing else came."""
    room = limit - 1 - count
    if room >= 0:
        # Only the window before has to fade a little more.
        return max(0.0, window * (1 - room / previous) - elapsed) if previous else 0.0
    # This window is full: it has to become the one before, and then to fade.
    return (window - elapsed) + window * (1 - max(0, limit - 1) / count)
