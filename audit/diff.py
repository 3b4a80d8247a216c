"""What changed between two states of a row, fit to be kept for ever."""

from __future__ import annotations

from typing import Any

from django.db import models

HIDDEN = "••••"
MAX_TEXT = 2048

State = dict[str, Any]


def state_of(row: models.Model) -> State:
    """The row's columns as JSON values. Fields that call themselves hidden appear as dots and are compared elsewhere.

    A field is hidden when it says `audit_hidden = True` (sealed secrets do) or is a password.
    """
    return {field.name: _value(row, field) for field in row._meta.concrete_fields if not _is_noise(field)}


def difference(before: State, after: State) -> dict[str, list[Any]]:
    """{"field": [before, after]} for each field that differs; hidden values show as dots, never as themselves."""
    changes = {}
    for name in {**before, **after}:
        old, new = before.get(name), after.get(name)
        if old != new:
            changes[name] = [_shown(old), _shown(new)]
    return changes


class Hidden(str):
    """A value that takes part in comparison but is never shown."""

    __slots__ = ()


def _is_noise(field: models.Field[Any, Any]) -> bool:
    """Columns that change with every save, or by themselves, tell nothing."""
    return field.name in {"version", "updated_at", "created_at", "last_login"} or bool(
        getattr(field, "audit_skip", False)
    )


def _value(row: models.Model, field: models.Field[Any, Any]) -> Any:
    value = getattr(row, field.attname)
    if getattr(field, "audit_hidden", False) or field.name == "password":
        return Hidden(value) if value else ""
    if value is None or isinstance(value, bool | int | float | dict | list):
        return value
    return str(value)[:MAX_TEXT]


def _shown(value: Any) -> Any:
    return HIDDEN if isinstance(value, Hidden) else value
