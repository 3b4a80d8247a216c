"""The sums of each hour: added to as usage records are inserted, and rebuilt from the records that are there.

Adding runs in the transaction of the insert, so each record is in the sums when it is there, and once. Both ways take a value for
at most `MOST`, so they come to the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from operator import add, itemgetter
from typing import Any
from uuid import UUID

from django.db import connection, transaction
from django.db.models import Count, Min, Q, Sum
from django.db.models.functions import Least

from proxy import retention
from proxy.key_use import MOST
from proxy.models.usage import GRAIN, TokensSource, UsageHour, UsageRecord
from proxy.usage_rows import Row

HOUR = timedelta(hours=1)
TOKENS = ("prompt_tokens", "completion_tokens", "cached_tokens", "cache_write_tokens", "reasoning_tokens")
SUMS = (
    "requests",
    "attempts",
    *TOKENS,
    "cost_nanodollars",
    "unpriced",
    "estimated",
    "duration_ms",
    "duration_count",
    "ttft_ms",
    "ttft_count",
)
COLUMNS = ("id", "hour", *GRAIN, *SUMS)

Grain = tuple[Any, ...]
"""An hour, and the values of GRAIN."""

_alike = itemgetter(*GRAIN)


def hour_of(moment: datetime) -> datetime:
    """The beginning of its hour, UTC."""
    return moment.astimezone(UTC).replace(minute=0, second=0, microsecond=0)


def count(rows: Iterable[Row]) -> None:
    """Add new usage rows to the sums of their hours. Call it once in a transaction: the sums are locked in order."""
    sums: dict[Grain, tuple[int, ...]] = {}
    nothing = (0,) * len(SUMS)
    for row in rows:
        grain = (hour_of(row["created_at"]), *_alike(row))
        sums[grain] = tuple(map(add, sums.get(grain, nothing), _values(row)))
    _add(sums)


def _add(sums: Mapping[Grain, Sequence[int]]) -> None:
    """Add to what is stored, in order, so that two who do it never wait for each other."""
    table, quoted = UsageHour._meta.db_table, connection.ops.quote_name
    added = ", ".join(
        f"{quoted(name)} = {quoted(table)}.{quoted(name)} + excluded.{quoted(name)}" for name in SUMS
    )
    marks = ", ".join(["%s"] * len(COLUMNS))
    rows = sorted((_digest(grain), *grain, *values) for grain, values in sums.items())
    # Only names of our own table and columns are put into the text.
    sql = (
        f"INSERT INTO {quoted(table)} ({', '.join(map(quoted, COLUMNS))}) VALUES ({marks})"  # noqa: S608  # see above
        f" ON CONFLICT (id) DO UPDATE SET {added}"
    )
    with connection.cursor() as cursor:
        cursor.executemany(sql, [_for_database(row) for row in rows])


def _values(row: Row) -> tuple[int, ...]:
    """What a record adds, in the order of SUMS."""
    cost, duration, ttft = row["cost_nanodollars"], row["duration_ms"], row["ttft_ms"]
    return (
        int(row["attempt"] == 1),
        1,
        *[min(row[name], MOST) for name in TOKENS],
        min(cost or 0, MOST),
        int(cost is None),
        int(row["tokens_source"] == TokensSource.ESTIMATED),
        min(duration or 0, MOST),
        int(duration is not None),
        min(ttft or 0, MOST),
        int(ttft is not None),
    )


def _digest(grain: Grain) -> UUID:
    hour, *names = grain
    text = json.dumps([hour.isoformat(), *names])
    return UUID(bytes=blake2b(text.encode(), digest_size=16).digest())


def _for_database(values: tuple[Any, ...]) -> list[Any]:
    """As Django itself writes the first two columns; the others are numbers and text."""
    key, hour, *others = values
    if connection.vendor == "sqlite":
        return [key.hex, connection.ops.adapt_datetimefield_value(hour), *others]
    return [key, hour, *others]


# -- rebuilding --------------------------------------------------------------------------------------------------------


def rebuild(
    *, since: datetime | None = None, until: datetime | None = None
) -> Iterator[tuple[datetime, int]]:
    """Rebuild the sums of every hour that has records, from that of `since` to before `until`: each hour, and its records.

    Each hour is a transaction of its own, so this can be ended at any point and run again, and drainers may run beside it. An hour
    with fewer records than its sums say, or none, keeps them: retention has taken records, maybe when it was shorter than now, and
    the sums are what is left of those.
    """
    hour = first_whole_hour()
    if hour is not None and since is not None:
        hour = max(hour, hour_of(since))
    while hour is not None and (until is None or hour < until):
        found = _rebuild_hour(hour)
        if found is not None:
            yield hour, found
        oldest = UsageRecord.objects.filter(created_at__gte=hour + HOUR).aggregate(at=Min("created_at"))["at"]
        hour = None if oldest is None else hour_of(oldest)


def first_whole_hour() -> datetime | None:
    """The first hour of which all records are still there; None without any record.

    What retention takes now is left out; and where older sums tell that it has taken records, it may have been stopped in the midst
    of the oldest hour that is left.
    """
    kept = UsageRecord.objects.all()
    if limit := retention.forgotten_before():
        kept = kept.filter(created_at__gte=limit)
    oldest = kept.aggregate(at=Min("created_at"))["at"]
    if oldest is None:
        return None
    hour = hour_of(oldest)
    if hour == limit or not UsageHour.objects.filter(hour__lt=hour).exists():
        return hour
    return hour + HOUR


def _rebuild_hour(hour: datetime) -> int | None:
    """Replace the sums of an hour by what its records come to; how many records that were, None where some are missing."""
    with transaction.atomic():
        _keep_drainers_out()
        records = UsageRecord.objects.filter(created_at__gte=hour, created_at__lt=hour + HOUR)
        found = list(records.order_by().values_list(*GRAIN).annotate(**_sums()))
        sums = {(hour, *row[: len(GRAIN)]): [int(one or 0) for one in row[len(GRAIN) :]] for row in found}
        attempts = sum(values[SUMS.index("attempts")] for values in sums.values())
        stored = UsageHour.objects.filter(hour=hour)
        if attempts < (stored.aggregate(all=Sum("attempts"))["all"] or 0):
            return None
        stored.delete()
        _add(sums)
    return attempts


def _sums() -> dict[str, Any]:
    """`_values`, of many records and in the database. Named apart from the columns, in the order of SUMS."""

    def total(name: str) -> Sum:
        # PostgreSQL's LEAST passes over nulls, so they are left out beforehand.
        return Sum(Least(name, MOST), filter=~Q(**{name: None}))

    sums = (
        Count("pk", filter=Q(attempt=1)),
        Count("pk"),
        *[total(name) for name in TOKENS],
        total("cost_nanodollars"),
        Count("pk", filter=Q(cost_nanodollars=None)),
        Count("pk", filter=Q(tokens_source=TokensSource.ESTIMATED)),
        total("duration_ms"),
        Count("duration_ms"),
        total("ttft_ms"),
        Count("ttft_ms"),
    )
    return {f"sum_{name}": one for name, one in zip(SUMS, sums, strict=True)}


def _keep_drainers_out() -> None:
    """Until the end of this transaction nobody adds to any sums, while everybody may read them.

    A drainer whose records we do not see has not added them yet, so it will do so to the sums that we leave; one that has added
    them already is waited for, and then we see its records. On SQLite a transaction is the only one that writes anyway.
    """
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            table = connection.ops.quote_name(UsageHour._meta.db_table)
            cursor.execute("SET LOCAL lock_timeout = '60s'")
            cursor.execute(f"LOCK TABLE {table} IN SHARE ROW EXCLUSIVE MODE")
