"""From a record of the spool to a row that every database takes, whatever a provider or a fault put into the record.

What does not fit is made to fit and named in the row's trace under `usage_invalid`, so that nobody mistakes it for a count.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from django.db import connection, models

from proxy.models.usage import COUNTS, TIMES, TokensSource, UsageRecord, UsageStatus

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
LAST_MS = 253_402_214_400_000
"""The first millisecond of 9999-12-31, UTC: later ones are no dates in every time zone."""
MAX_BIG = 2**63 - 1
MAX_SMALL = 2**15 - 1
MAX_DEPTH = 32

TEXTS = {
    field.name: field.max_length
    for field in UsageRecord._meta.get_fields()
    if isinstance(field, models.CharField) and field.max_length and not field.choices
}
ROW_IDS = ("gateway_key_id", "provider_id", "api_key_id")
FLAGS = ("stream", "client_disconnected")
STATUSES = frozenset(UsageStatus.values)
SOURCES = frozenset(TokensSource.values)


Row = dict[str, Any]
"""Values by column, for every column of UsageRecord."""

COLUMNS = [str(field.column) for field in UsageRecord._meta.concrete_fields]


def usage_row(record: Mapping[str, Any]) -> Row | None:
    """The row of a final record (or of a start with a status); None when its id is no UUID."""
    try:
        key = uuid.UUID(record["id"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    wrong: list[str] = []
    values: Row = {name: _text(record.get(name), size) for name, size in TEXTS.items()}
    for name in COUNTS:
        values[name] = _whole(record, name, wrong) or 0
    for name in (*TIMES, *ROW_IDS):
        values[name] = _whole(record, name, wrong)
    for name in FLAGS:
        values[name] = record.get(name) is True
    values["attempt"] = _whole(record, "attempt", wrong, MAX_SMALL) or 1
    values["http_status"] = _whole(record, "http_status", wrong, MAX_SMALL)
    values["status"] = _choice(record, "status", STATUSES, UsageStatus.ERROR, wrong)
    values["tokens_source"] = _choice(record, "tokens_source", SOURCES, TokensSource.NONE, wrong)
    values["cost_nanodollars"], values["price_id"] = _cost(record, wrong)
    values["created_at"] = _moment(record, key, wrong)
    values["trace"] = _trace(record.get("trace"), wrong)
    return {"id": key, **values}


def insert(rows: Sequence[Row]) -> list[Row]:
    """Insert rows in one statement; those that are there already are left as they are. The rows that were new.

    Not `bulk_create`: preparing 31 columns one by one costs 100 us a row, and PostgreSQL as much again to parse them.
    An array per column (PostgreSQL) and a prepared statement (SQLite) replay the spool several times as fast. And where
    SQLite's INSERT OR IGNORE would drop a row that breaks any rule, this one only passes over an id that is known.
    """
    if not rows:
        return []
    # Only names of our own columns and types are put into the text.
    into = f"INSERT INTO {_quoted(UsageRecord._meta.db_table)} ({', '.join(map(_quoted, COLUMNS))})"
    with connection.cursor() as cursor:
        if connection.vendor == "postgresql":
            kinds = (
                str(field.db_type(connection)).partition("(")[0]
                for field in UsageRecord._meta.concrete_fields
            )
            arrays = ", ".join(f"%s::{kind}[]" for kind in kinds)
            cursor.execute(
                f"{into} SELECT * FROM UNNEST({arrays}) ON CONFLICT (id) DO NOTHING RETURNING id",  # noqa: S608  # see above
                [[_json(row[name]) if name == "trace" else row[name] for row in rows] for name in COLUMNS],
            )
            new = {key for (key,) in cursor.fetchall()}
        else:
            # Nobody else writes before we commit, so what is not there now is new.
            known = set(
                UsageRecord.objects.filter(id__in=[row["id"] for row in rows]).values_list("id", flat=True)
            )
            new = {row["id"] for row in rows} - known
            marks = ", ".join(["%s"] * len(COLUMNS))
            cursor.executemany(
                f"{into} VALUES ({marks}) ON CONFLICT (id) DO NOTHING",
                [[_for_sqlite(name, row[name]) for name in COLUMNS] for row in rows],
            )
    # An id that comes twice in one batch is one row.
    return list({row["id"]: row for row in reversed(rows) if row["id"] in new}.values())


def _quoted(name: str) -> str:
    return connection.ops.quote_name(name)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _for_sqlite(name: str, value: Any) -> Any:
    """As Django itself writes these columns there."""
    if name == "trace":
        return _json(value)
    if name == "id":
        return value.hex
    return connection.ops.adapt_datetimefield_value(value) if name == "created_at" else value


def _whole(record: Mapping[str, Any], name: str, wrong: list[str], most: int = MAX_BIG) -> int | None:
    """A number from 0 to `most`; what lies outside is clamped, what is no number is nothing, and both are named."""
    value = record.get(name)
    if value is None:
        return None
    if type(value) is int and 0 <= value <= most:
        return value
    wrong.append(name)
    if type(value) is int or (type(value) is float and not math.isnan(value)):
        return int(max(0, min(value, most)))
    return None


def _cost(record: Mapping[str, Any], wrong: list[str]) -> tuple[int | None, int | None]:
    """A cost and the price it was made of; one without the other is worth nothing, and said to be wrong."""
    cost, price_id = (_whole(record, name, wrong) for name in ("cost_nanodollars", "price_id"))
    if cost is not None and price_id is not None:
        return cost, price_id
    if (cost is not None or price_id is not None) and "cost_nanodollars" not in wrong:
        wrong.append("cost_nanodollars")
    return None, None


def _text(value: Any, size: int) -> str:
    """At most `size` characters, without NUL, which PostgreSQL has no place for."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else str(value)
    return (text.replace("\0", "") if "\0" in text else text)[:size]


def _choice(
    record: Mapping[str, Any], name: str, known: frozenset[str], default: str, wrong: list[str]
) -> str:
    value = record.get(name)
    if isinstance(value, str) and value in known:
        return value
    if value is not None or name == "status":
        wrong.append(name)
    return default


def _moment(record: Mapping[str, Any], key: uuid.UUID, wrong: list[str]) -> datetime:
    """created_at; where it is missing or absurd, the time that a UUIDv7 begins with."""
    value = record.get("created_at")
    if type(value) is not int or not 0 <= value < LAST_MS:
        wrong.append("created_at")
        value = min(key.int >> 80, LAST_MS)
    return EPOCH + timedelta(milliseconds=value)


def _trace(trace: Any, wrong: list[str]) -> Any:
    kept = None if trace is None else _clean(trace)
    if not wrong:
        return kept
    return {**(kept if isinstance(kept, dict) else {"trace": kept}), "usage_invalid": wrong}


def _clean(value: Any, depth: int = 0) -> Any:
    """JSON that PostgreSQL and SQLite both take: no NUL, no infinities, not deep."""
    if isinstance(value, str):
        return value.replace("\0", "")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if not isinstance(value, dict | list):
        return value
    if depth >= MAX_DEPTH:
        return None
    if isinstance(value, dict):
        return {_clean(key): _clean(item, depth + 1) for key, item in value.items()}
    return [_clean(item, depth + 1) for item in value]
