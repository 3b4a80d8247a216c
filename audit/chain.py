"""The hash chain over entries. Pure."""

from __future__ import annotations

import hashlib
import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, Protocol

GENESIS = "0" * 64


class Chained(Protocol):
    """What of an entry is hashed."""

    seq: int
    timestamp: datetime
    action: str
    entity_type: str
    entity_id: str
    entity_name: str
    user_id: int | None
    username: str
    via: str
    ip: str | None
    request_id: str
    changes: Any


FIELDS = tuple(Chained.__annotations__)


def link(previous: str, entry: Chained) -> str:
    """Hex SHA-256 of the previous hash and the entry as canonical JSON (sorted keys, no spaces, UTC microseconds)."""
    values = {name: getattr(entry, name) for name in FIELDS}
    values["timestamp"] = entry.timestamp.astimezone(UTC).isoformat(timespec="microseconds")
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(f"{previous}\n{text}".encode()).hexdigest()


def storable(value: Any) -> Any:
    """A JSON value whose numbers every database gives back as they are hashed.

    PostgreSQL writes numbers out, so that 1e16 comes back as an integer, and has no -0.0. What Python writes without an
    exponent, or with a negative one, comes back as the same float.
    """
    if isinstance(value, dict):
        return {name: storable(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [storable(item) for item in value]
    if isinstance(value, float) and abs(value) >= 1e16:
        return int(Decimal(repr(value)))
    return 0.0 if isinstance(value, float) and value == 0 else value
