"""Mending the queue. Whoever can write to Redis can put something there that ends every worker that reads it (R56)."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

from redis import Redis, RedisError

logger = logging.getLogger(__name__)

SEPARATOR = b"\x06\x16"
"""Between the three parts of one of kombu's bindings."""
TYPES = {
    b"celery": b"list",
    b"unacked": b"hash",
    b"unacked_index": b"zset",
    b"_kombu.binding_deadlines": b"zset",
}
PREFIXES = {b"_kombu.binding": b"set", b"celery" + SEPARATOR: b"list"}
TIMEOUT = 3.0


def mend(url: str) -> None:
    """Remove what Celery cannot read. What is due is a column in the database, so nothing is lost with it.

    Redis being away is no error here: Celery waits for it by itself.
    """
    try:
        with Redis.from_url(url, socket_timeout=TIMEOUT, socket_connect_timeout=TIMEOUT) as redis:
            for name in [*_keys(redis)]:
                _mend_key(redis, name)
    except RedisError as error:
        logger.warning("the queue could not be looked at: %s", type(error).__name__)


def _keys(redis: Any) -> Iterator[bytes]:
    for pattern in ("celery*", "unacked*", "_kombu.*"):
        yield from redis.scan_iter(pattern)


def _mend_key(redis: Any, name: bytes) -> None:
    wanted = TYPES.get(name) or next((t for prefix, t in PREFIXES.items() if name.startswith(prefix)), None)
    if wanted is None:
        return
    if redis.type(name) != wanted:
        logger.warning("removed %r from Redis: it is no %s", name, wanted.decode())
        redis.delete(name)
    elif wanted == b"list":
        _remove(
            name, [redis.lrem(name, 0, item) for item in redis.lrange(name, 0, -1) if not _is_message(item)]
        )
    elif wanted == b"hash":
        items = redis.hgetall(name).items()
        _remove(name, [redis.hdel(name, tag) for tag, item in items if not _is_delivery(item)])
    elif wanted == b"set":
        _remove(name, [redis.srem(name, each) for each in redis.smembers(name) if each.count(SEPARATOR) != 2])


def _remove(name: bytes, removed: list[Any]) -> None:
    if removed:
        logger.warning("removed %d unreadable entries of %r from Redis", len(removed), name)


def _is_message(item: bytes) -> bool:
    """Whether kombu can read it; what the message asks for is Celery's to judge, which accepts JSON and known names."""
    try:
        message = json.loads(item)
        properties = message["properties"]
        return (
            isinstance(properties["delivery_info"], dict)
            and "delivery_tag" in properties
            and "body" in message
        )
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_delivery(item: bytes) -> bool:
    """An unacknowledged message: the message, its exchange and its routing key."""
    try:
        message, _, _ = json.loads(item)
        return _is_message(json.dumps(message).encode())
    except (ValueError, TypeError, RecursionError):
        return False
