"""The way a request took, out of the trace of its usage record, for people to read.

A trace is what a worker wrote and a spool carried: rows are kept for long and spools get damaged, so every shape is read, and
nothing in it is taken for anything but text. The two shapes that were ever written are
`{"candidates": ["slug/model: taken", ...], "attempts": [{"to", "key", "outcome", and times in ms}, ...]}` and, before that,
a list of the lines alone; `usage_invalid` names columns that were not usable (`proxy.usage_rows`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from django.utils.safestring import SafeString

from providers.admin.badges import badge

MOST = 100
"""Lines and attempts that a page shows."""
LONGEST = 300
"""Characters of one text."""

TIMES = {"queue": "Began after", "connect": "Connected", "first_token": "First token", "total": "Took"}
COLOURS = {"success": "good", "client_disconnected": "plain"}


@dataclass(frozen=True, slots=True)
class Tried:
    """One attempt. times: (what it is, milliseconds in words), in the order of TIMES."""

    to: str
    key: str
    outcome: SafeString
    times: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Way:
    """candidates: (`slug/model`, why it was taken or not). more: how many of them are not shown.

    attempts: those up to this record's own. unsound: columns whose values were not usable. cache: `hit` or `miss`, where answers are kept.
    """

    candidates: tuple[tuple[str, str], ...] = ()
    more: int = 0
    attempts: tuple[Tried, ...] = ()
    unsound: tuple[str, ...] = ()
    cache: str = ""

    @property
    def times(self) -> tuple[str, ...]:
        """The headings of the times."""
        return tuple(TIMES.values())


def way_of(trace: object) -> Way:
    """What a trace says, whatever its shape. Never raises."""
    told: Mapping[str, Any] = trace if isinstance(trace, dict) else {"candidates": trace}
    lines = _listed(told.get("candidates", told.get("trace")))
    attempts = [each for each in _listed(told.get("attempts")) if isinstance(each, dict)]
    return Way(
        candidates=tuple(_candidate(_text(line)) for line in lines[:MOST]),
        more=max(0, len(lines) - MOST),
        attempts=tuple(_tried(each) for each in attempts[:MOST]),
        unsound=tuple(_text(name) for name in _listed(told.get("usage_invalid"))[:MOST]),
        cache=_text(told.get("cache", "")),
    )


def _candidate(line: str) -> tuple[str, str]:
    name, _, reason = line.partition(": ")
    return name, reason


def _tried(attempt: Mapping[str, Any]) -> Tried:
    outcome = _text(attempt.get("outcome"))
    return Tried(
        to=_text(attempt.get("to")),
        key=_text(attempt.get("key")),
        outcome=badge(outcome, COLOURS.get(outcome, "bad"), outcome),
        times=tuple(_times(attempt)),
    )


def _times(attempt: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, heading in TIMES.items():
        value = attempt.get(name)
        known = isinstance(value, int | float) and not isinstance(value, bool)
        yield heading, f"{value} ms" if known else "-"


def _listed(value: Any) -> list[Any]:
    """A list as it is, one thing as a list of it, nothing as an empty one."""
    return value if isinstance(value, list) else [] if value is None else [value]


def _text(value: Any) -> str:
    return "-" if value is None else str(value)[:LONGEST]
