"""Millions of usage records, made by the database itself: a month of fifty keys, two models each, with an error now and then."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import psycopg
from django.db import connection

from proxy.models import UsageRecord

KEYS = 50
DAYS = 30
PIECE = 50_000
"""Records of one statement, which takes no longer than any statement may."""
MONTH = datetime(2026, 9, 1, tzinfo=UTC)
"""Where the month begins that is filled."""

_POSTGRESQL_SERIES = "SELECT i, {start} + i * {step} AS ms FROM generate_series({first}::bigint, {last}) i"
_SQLITE_SERIES = (
    "WITH RECURSIVE series(i) AS (SELECT {first} UNION ALL SELECT i + 1 FROM series WHERE i < {last})"
    " SELECT i, {start} + i * {step} AS ms FROM series"
)
_POSTGRESQL = {
    "id": "(lpad(to_hex(ms), 12, '0') || '7' || lpad(to_hex(i % 4096), 3, '0') || '8' || lpad(to_hex(i), 15, '0'))::uuid",
    "created_at": "to_timestamp(ms / 1000.0)",
    "stream": "i % 2 = 0",
    "client_disconnected": "false",
    "trace": '\'{"candidates": ["box/tiny: taken"]}\'::jsonb',
}
_SQLITE = {
    "id": "printf('%012x7%03x8%015x', ms, i % 4096, i)",
    "created_at": "strftime('%Y-%m-%d %H:%M:%f000', ms / 1000.0, 'unixepoch')",
    "stream": "i % 2 = 0",
    "client_disconnected": "0",
    "trace": '\'{"candidates": ["box/tiny: taken"]}\'',
}
# What only looks random: primes that have nothing to do with each other.
_KEY = f"(i * 7919 % {KEYS} + 1)"
_MODEL = f"(({_KEY} + i * 104729 % 7 / 6) % 12)"
_SHARED = {
    "request_id": "'request-' || i",
    "attempt": "1 + (i % 40) / 39",
    "gateway_key_id": _KEY,
    "gateway_key": f"'key ' || {_KEY}",
    "owner": f"'user' || {_KEY} % 20",
    "route": "'route:fast'",
    "provider_id": f"{_MODEL} / 2 + 1",
    "provider": f"'provider-' || ({_MODEL} / 2 + 1)",
    "api_key_id": f"{_MODEL} / 2 + 1",
    "requested_model": "'fast'",
    "model": f"'model-' || {_MODEL}",
    "purpose": "'chat'",
    "status": "CASE i % 40 WHEN 0 THEN 'error' WHEN 20 THEN 'client_disconnected' ELSE 'success' END",
    "error_code": "CASE i % 40 WHEN 0 THEN 'upstream_timeout' ELSE '' END",
    "http_status": "200",
    "prompt_tokens": "i % 4000",
    "completion_tokens": "i % 700",
    "cached_tokens": "0",
    "cache_write_tokens": "0",
    "reasoning_tokens": "0",
    "tokens_source": "'provider'",
    "cost_nanodollars": "CASE i % 100 WHEN 0 THEN NULL ELSE i % 9000000 END",
    "price_id": "1",
    "ttft_ms": "i % 900",
    "duration_ms": "i % 9000",
    "bytes_out": "i % 50000",
}


def fill(number: int, *, since: datetime = MONTH, days: int = DAYS) -> None:
    """Insert so many records, at even intervals of so many days."""
    step = timedelta(days=days) // timedelta(milliseconds=1) // number
    for first in range(0, number, PIECE):
        _insert(first, min(first + PIECE, number) - 1, since, step)
    with connection.cursor() as cursor:
        # Of this table alone: those of the whole server would be waited for.
        cursor.execute(f"ANALYZE {UsageRecord._meta.db_table}")


def _insert(first: int, last: int, since: datetime, step: int) -> None:
    postgresql = connection.vendor == "postgresql"
    values = {**_SHARED, **(_POSTGRESQL if postgresql else _SQLITE)}
    columns = [str(field.column) for field in UsageRecord._meta.concrete_fields]
    series = (_POSTGRESQL_SERIES if postgresql else _SQLITE_SERIES).format(
        start=int(since.timestamp() * 1000), step=step, first=first, last=last
    )
    with connection.cursor() as cursor:
        cursor.execute(
            f"INSERT INTO {UsageRecord._meta.db_table} ({', '.join(columns)})"
            f" SELECT {', '.join(values[name] for name in columns)} FROM ({series}) made"
        )


def vacuum() -> None:
    """What autovacuum does in time; it takes longer than one of our own connections may wait."""
    given = connection.settings_dict
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD", "dbname": "NAME"}
    with psycopg.connect(**{name: given[key] for name, key in names.items()}, autocommit=True) as own:
        own.execute("VACUUM ANALYZE")
