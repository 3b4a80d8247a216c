"""A difference as people and programs read it: one thing after another, each with its fields before and after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from audit.models import Entry
from audit.strict_json import readable
from proxy.configuration.restoring import Outcome

SIGNS = {"add": "+", "delete": "-"}


def as_lines(entries: Iterable[Entry]) -> Iterator[str]:
    """`+` new, `~` changed, `-` gone; of what is changed, each field. Secrets are dots."""
    for entry in entries:
        sign = SIGNS.get(entry.action.partition("_")[0], "~")
        yield f"{sign} {entry.entity_type} {entry.entity_name}"
        if sign == "~":
            for name, (before, after) in entry.changes.items():
                yield f"    {name}: {readable(before)} -> {readable(after)}"


def as_values(outcome: Outcome, *, dry_run: bool) -> dict[str, Any]:
    """The same as JSON values."""
    return {
        "dry_run": dry_run,
        "changed": len(outcome.changes),
        "changes": [
            {
                "action": entry.action,
                "entity_type": entry.entity_type,
                "entity_name": entry.entity_name,
                "changes": entry.changes,
            }
            for entry in outcome.changes
        ],
        "notes": list(outcome.notes),
    }


def in_a_word(outcome: Outcome, *, planned: bool) -> str:
    count = len(outcome.changes)
    if not count:
        return "nothing to change"
    things = "1 thing" if count == 1 else f"{count} things"
    return f"{things} would change" if planned else f"{things} changed"
