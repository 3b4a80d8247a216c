"""Reading what an upstream says without trusting it: JSON in, checked Python values out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import orjson

from providers.errors import ProtocolError

MOST_TOKENS = 1_000_000_000
"""A count above this is a mistake or an attack, not an answer (R36)."""


def parse_object(data: bytes) -> dict[str, Any]:
    """A JSON object. Raises ProtocolError for anything else."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        value = _with_half_characters(data, error)
    if not isinstance(value, dict):
        raise ProtocolError(detail=f"a JSON object was expected, not {type(value).__name__}")
    return value


def _with_half_characters(data: bytes, error: Exception) -> Any:
    """Some servers cut a text within a character that JSON escapes as two halves. orjson refuses a half alone, the slower
    library does not."""
    try:
        if b"\\u" in data:
            return json.loads(data.decode(), parse_constant=_not_json)
    except (ValueError, RecursionError):
        pass
    raise ProtocolError(detail=f"not JSON: {error}") from None


def _not_json(name: str) -> Any:
    raise ValueError(name)


def object_or_empty(data: bytes) -> dict[str, Any]:
    """A JSON object, or an empty one when it is none: for the bodies of errors, which may be anything."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        return {}
    if isinstance(value, list) and value:
        value = value[0]
    return value if isinstance(value, dict) else {}


def dump(value: Mapping[str, Any]) -> bytes:
    """JSON. orjson refuses integers beyond 64 bits and lone surrogates, which JSON allows; the slower library does not."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def count(value: Any) -> int | None:
    """A count of tokens, 0 for null; None when it is not one: negative, huge, a fraction, text, a truth value."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return value if 0 <= value <= MOST_TOKENS else None


def size(value: Any) -> int | None:
    """A size that a provider tells of its model, or None when it does not, or tells nonsense."""
    return count(value) or None
