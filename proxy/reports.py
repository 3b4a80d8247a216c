"""What usage comes to: sums of a period, by whatever one wants to tell apart, from the sums of its hours.

A period is one of whole hours (UTC): its ends are moved outwards to them, and the answer says which they are. So a report never
reads records, and what it says does not change when retention takes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from django.db.models import F, Model, Q, QuerySet, Sum
from django.db.models.functions import TruncDay
from django.utils import timezone

from audit import roles
from providers.models import Provider
from proxy.models import GatewayKey, UsageHour
from proxy.models.keys import keys_of
from proxy.models.usage import UsageStatus
from proxy.usage_hours import HOUR, SUMS, TOKENS, hour_of

M = TypeVar("M", bound=Model)

PERIOD = timedelta(days=30)
"""What a report is about when nobody says."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    "key": ("gateway_key_id", "gateway_key"),
    "owner": ("owner",),
    "provider": ("provider_id", "provider"),
    "api_key": ("api_key_id",),
    "model": ("model",),
    "route": ("route",),
    "purpose": ("purpose",),
    "status": ("status",),
}
"""What may be told apart, and by which columns. A key that was renamed has a line under each name, with one id."""

BUCKETS = ("hour", "day")
FAILED = frozenset(UsageStatus.values) - {UsageStatus.SUCCESS, UsageStatus.CLIENT_DISCONNECTED}
"""How an attempt ends that is an error; a caller who leaves is none."""

MEASURES = (
    "requests", "attempts", "errors", "prompt_tokens", "completion_tokens", "total_tokens", "cached_tokens", "cache_write_tokens",
    "reasoning_tokens", "cost_usd", "unpriced", "estimated", "mean_duration_ms", "mean_ttft_ms",
)  # fmt: skip
"""What a line of a report tells, in order."""

Line = dict[str, Any]
"""Bucket and names as asked for, then MEASURES."""


class UtcDay(TruncDay):
    """The day (UTC) of an hour. SQLite's dates are texts, and it can cut them itself; Django would ask Python for each row."""

    def as_sqlite(self, compiler: Any, connection: Any, **extra: Any) -> tuple[str, Any]:
        text, params = compiler.compile(self.lhs)
        return f"strftime('%%Y-%%m-%%d 00:00:00', {text})", params


class TooManyLines(Exception):
    """A report that nobody could read, and that would not fit into memory."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A report. since, until: whole hours, `until` not included. group_by: of GROUPS. bucket: of BUCKETS, or all in one."""

    since: datetime
    until: datetime
    group_by: tuple[str, ...] = ()
    bucket: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of a line's columns, in order."""
        named = [name for group in self.group_by for name in _names(group)]
        return (*(("bucket",) if self.bucket else ()), *named, *MEASURES)

    @property
    def columns(self) -> tuple[str, ...]:
        bucket = ("bucket",) if self.bucket else ()
        return (*bucket, *(column for group in self.group_by for column in GROUPS[group]))


def asked(
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    group_by: Sequence[str] = (),
    bucket: str | None = None,
) -> Asked:
    """A report whose period is made one of whole hours; the last thirty days where nobody says."""
    end = until or timezone.now()
    last = hour_of(end)
    whole = last if last == end else last + HOUR
    return Asked(hour_of(since or end - PERIOD), whole, tuple(dict.fromkeys(group_by)), bucket)


def lines(sums: QuerySet[UsageHour], report: Asked, *, most: int) -> list[Line]:
    """The lines of a report, by bucket and then the largest first. TooManyLines when there are more than `most`."""
    return [_line(report, row) for row in _rows(sums, report, most=most)]


def lines_and_totals(sums: QuerySet[UsageHour], report: Asked, *, most: int) -> tuple[list[Line], Line]:
    """The same, and what it comes to: `totals` without a second look at a hundred thousand sums."""
    rows, whole = _rows(sums, report, most=most), Asked(report.since, report.until)
    measures = [row[len(report.columns) :] for row in rows]
    added = tuple(sum(row[n] or 0 for row in measures) for n in range(len(_measured())))
    return [_line(report, row) for row in rows], _line(whole, added)


def _rows(sums: QuerySet[UsageHour], report: Asked, *, most: int) -> list[tuple[Any, ...]]:
    """Columns and measures of each line."""
    found = list(_grouped(sums, report)[: most + 1])
    if len(found) > most:
        raise TooManyLines
    return found


def line_by_line(sums: QuerySet[UsageHour], report: Asked, *, most: int) -> Iterator[list[Line]]:
    """The same for a report of any length: the lines of one bucket at a time, of which there may be `most`.

    Hours without sums are leapt over: whoever asks for a thousand years waits no longer than what there is takes.
    """
    if report.bucket is None:
        yield lines(sums, report, most=most)
        return
    since = report.since
    while (first := _first_hour(sums, Asked(since, report.until))) is not None:
        end = first + HOUR if report.bucket == "hour" else first.replace(hour=0) + timedelta(days=1)
        until = min(end, report.until)
        yield lines(sums, Asked(first, until, report.group_by, report.bucket), most=most)
        since = until


def _first_hour(sums: QuerySet[UsageHour], report: Asked) -> datetime | None:
    """The first of a period that has sums. By the order and not by the least, so that the index of hours is walked."""
    return _within(sums, report).order_by("hour").values_list("hour", flat=True).first()


def totals(sums: QuerySet[UsageHour], report: Asked) -> Line:
    """The measures of the whole period."""
    whole = Asked(report.since, report.until)
    values = _within(sums, whole).aggregate(**_measured())
    return _line(whole, tuple(values.values()))


def _within(sums: QuerySet[UsageHour], report: Asked) -> QuerySet[UsageHour]:
    return sums.filter(hour__gte=report.since, hour__lt=report.until).order_by()


def _grouped(sums: QuerySet[UsageHour], report: Asked) -> Any:
    rows: Any = _within(sums, report)
    if report.bucket:
        bucket = UtcDay("hour", tzinfo=UTC) if report.bucket == "day" else F("hour")
        rows = rows.annotate(bucket=bucket)
    if not report.columns:
        # Without anything to tell apart, one line is all there is.
        return [tuple(rows.aggregate(**_measured()).values())]
    first = ("bucket",) if report.bucket else ()
    order = (*first, "-sum_cost_nanodollars", "-sum_attempts", *report.columns)
    return rows.values_list(*report.columns).annotate(**_measured()).order_by(*order)


def _measured() -> dict[str, Any]:
    """The sums of sums, named apart from the columns."""
    failed = Sum("attempts", filter=Q(status__in=FAILED))
    return {**{f"sum_{name}": Sum(name) for name in SUMS}, "sum_errors": failed}


def _line(report: Asked, row: tuple[Any, ...]) -> Line:
    columns = report.columns
    names = dict(zip(columns, row, strict=False))
    sums = {name: int(value or 0) for name, value in zip((*SUMS, "errors"), row[len(columns) :], strict=True)}
    line: Line = {"bucket": names["bucket"].astimezone(UTC)} if report.bucket else {}
    for group in report.group_by:
        line |= zip(_names(group), (names[column] for column in GROUPS[group]), strict=True)
    return {
        **line,
        **{name: sums[name] for name in ("requests", "attempts", "errors", *TOKENS[:2])},
        "total_tokens": sums["prompt_tokens"] + sums["completion_tokens"],
        **{name: sums[name] for name in TOKENS[2:]},
        "cost_usd": dollars(sums["cost_nanodollars"]),
        "unpriced": sums["unpriced"],
        "estimated": sums["estimated"],
        "mean_duration_ms": _mean(sums["duration_ms"], sums["duration_count"]),
        "mean_ttft_ms": _mean(sums["ttft_ms"], sums["ttft_count"]),
    }


def _names(group: str) -> tuple[str, ...]:
    """("key_id", "key") for what has an id and a name."""
    return (f"{group}_id", group) if len(GROUPS[group]) > 1 else (group,)


def _mean(total: int, count: int) -> int | None:
    return round(total / count) if count else None


def dollars(nanodollars: int) -> str:
    """US dollars as a decimal text with nine digits behind the point, so that nothing is rounded."""
    whole, rest = divmod(nanodollars, 10**9)
    return f"{whole}.{rest:09d}"


# -- which usage -------------------------------------------------------------------------------------------------------


def seen_by(user: Any, rows: QuerySet[M]) -> QuerySet[M]:
    """Of usage records or sums those that this person may read: all, or those of the keys that are his."""
    if not roles.may(user, "usage", "read"):
        return rows.none()
    if not roles.own_only(user, "usage", "read"):
        return rows
    # As a list: one key's newest records are then found by its index, and not by walking through everybody's.
    return rows.filter(gateway_key_id__in=list(keys_of(user).values_list("pk", flat=True)))


def narrowed(rows: QuerySet[M], wanted: Mapping[str, str | None]) -> QuerySet[M]:
    """Of usage records or sums those with these values of gateway_key, provider, owner, model and status, where they are given.

    A gateway key or provider is named by its id or name (slug); its records from before it was renamed are among them.
    """
    for name, value in wanted.items():
        if not value:
            continue
        if name == "gateway_key":
            rows = rows.filter(_one_of(name, value, GatewayKey.objects.filter(name=value)))
        elif name == "provider":
            rows = rows.filter(_one_of(name, value, Provider.objects.filter(slug=value)))
        else:
            rows = rows.filter(**{name: value})
    return rows


def _one_of(name: str, value: str, known: QuerySet[Any]) -> Q:
    if value.isascii() and value.isdigit() and len(value) <= 18:
        return Q(**{f"{name}_id": int(value)})
    pk = known.values_list("pk", flat=True).first()
    # What was deleted has only its name left.
    return Q(**{name: value}) if pk is None else Q(**{f"{name}_id": pk})


def about_as_many(
    sums: QuerySet[UsageHour], *, since: datetime | None, until: datetime | None, oldest: datetime
) -> int:
    """About how many records there are: those of all hours that the period touches, as far as records go back."""
    sums = sums.filter(hour__gte=hour_of(max(since, oldest) if since else oldest))
    if until is not None:
        sums = sums.filter(hour__lt=until)
    return int(sums.aggregate(found=Sum("attempts"))["found"] or 0)
