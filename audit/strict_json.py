"""Reading JSON from strangers: everything that a parser is usually lenient about is an error, and it costs little.

Refused: bytes that are not UTF-8, a byte order mark, duplicate keys, NaN and infinities (also by overflow), integers of
more than 4,300 digits, nesting below 200 levels, lone surrogates, NUL characters, and documents of so many values
that parsing alone would stall the process. Structure is counted before it is parsed: 10 MB of `{"b":1},` would
otherwise cost 850 ms and 300 MB.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import orjson

MAX_STRINGS = 200_000
MAX_CONTAINERS = 100_000
MAX_VALUES = 1_000_000
MAX_DEPTH = 200
"""Levels. What was read is written again, and writers give up earlier than readers: orjson at 254 levels."""
FEW_VALUES = 2000
"""Up to so many it pays to look at each after a quick parser."""
UNSURE = object()
SMALL = 2 * MAX_CONTAINERS
"""Bytes below which no document can have too much of anything: the smallest container is `[]`."""

_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
_ESCAPES = re.compile(rb"\\u(?:0000|[dD][89a-fA-F])")
_SURROGATE = re.compile("[\x00\ud800-\udfff]")


class StrictJSONError(ValueError):
    """What is wrong with the document, in one sentence."""


def loads(body: bytes, *, counted: bool = True) -> Any:
    """The value of the document. Raises StrictJSONError.

    counted: False where the document comes from the machine's own administrator and may have any number of values.
    """
    if counted:
        _check_size(body)
    value = _quickly(body)
    if value is UNSURE:
        value = _thoroughly(body)
    _check_depth(value)
    # Looking for a backslash first is ten times as fast as the pattern.
    if b"\\" in body and _ESCAPES.search(body):
        _check_text(value)
    return value


def _quickly(body: bytes) -> Any:
    """The value as a parser finds it that needs a third of the time for long texts; UNSURE where that may be too lenient.

    Of two like keys it takes the last, and integers beyond 64 bits it makes floats. The first did not happen where it found as many
    texts as there are pairs of quotes; where a backslash may stand before the end of a text, quotes are not told apart.
    """
    quotes = body.count(b'"')
    if b"\\" in body and b"\\\\" not in body:
        quotes -= body.count(b'\\"')
    if quotes > 2 * FEW_VALUES:
        return UNSURE
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError:
        return UNSURE
    return found if 2 * _texts_in(found) == quotes else UNSURE


def _texts_in(found: Any) -> int:
    """How many texts there are, keys among them; -1 where there is too much to look at, or what may have been a large integer."""
    texts, values = 0, [found]
    for value in values:  # It grows meanwhile.
        if isinstance(value, str):
            texts += 1
        elif isinstance(value, dict | list):
            if len(values) + len(value) > FEW_VALUES:
                return -1
            if isinstance(value, dict):
                texts += len(value)
                values += value.values()
            else:
                values += value
        elif isinstance(value, float) and abs(value) >= 2**63:
            return -1
    return texts


def _thoroughly(body: bytes) -> Any:
    try:
        return _decoder.decode(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise StrictJSONError("The body is not UTF-8.") from error
    except RecursionError as error:
        raise StrictJSONError("The body is nested too deeply.") from error
    except StrictJSONError:
        raise
    except json.JSONDecodeError as error:
        raise StrictJSONError(f"The body is not JSON: {error.msg} at character {error.pos}.") from error
    except ValueError as error:
        raise StrictJSONError("A number in the body has too many digits.") from error


def readable(value: Any, *, indent: int | None = None) -> str:
    """JSON for people to read. Half of a surrogate pair, which an older row may hold, stays an escape: UTF-8 cannot write it."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode()


def _check_size(body: bytes) -> None:
    if len(body) < SMALL:
        return
    quotes = body.count(b'"')
    # A quote inside a text is escaped; only when there are too many is it worth counting which are.
    if quotes > 2 * MAX_STRINGS and quotes - body.count(b'\\"') > 2 * MAX_STRINGS:
        raise StrictJSONError("The body has too many keys and texts.")
    if body.count(b"{") + body.count(b"[") > MAX_CONTAINERS or body.count(b",") > MAX_VALUES:
        # Most of them may stand inside texts, as in a prompt full of code; only then is it worth looking closer.
        bare = _STRING.sub(b'""', body)
        if bare.count(b"{") + bare.count(b"[") > MAX_CONTAINERS or bare.count(b",") > MAX_VALUES:
            raise StrictJSONError("The body has too many values.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise StrictJSONError("An object in the body has the same key twice.")
    return value


def _constant(name: str) -> Any:
    raise StrictJSONError(f"{name} is not a JSON number.")


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise StrictJSONError("A number in the body is too large.")
    return value


def _check_depth(value: Any) -> None:
    """Level by level, since the nesting is not ours to recurse into; a usual request has four."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        level = [
            child
            for each in level
            for child in (each.values() if type(each) is dict else each)
            if type(child) is dict or type(child) is list
        ]
        if not level:
            return
    raise StrictJSONError("The body is nested too deeply.")


# Made once: `json.loads` would make one for every document.
_decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)


def _check_text(value: Any) -> None:
    """Only asked when an escape in the body makes it worth walking; a stack, since the nesting is not ours."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            if _SURROGATE.search(item):
                raise StrictJSONError("A text in the body has a NUL character or half of a surrogate pair.")
        elif isinstance(item, dict):
            stack.extend(item.keys())
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
