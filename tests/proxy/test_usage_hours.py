"""The sums of each hour: what the drainer adds up is what the records come to."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import OperationalError, connection, transaction
from django.utils import timezone
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.django import TestCase

from proxy import usage, usage_hours
from proxy.models import UsageHour, UsageRecord
from proxy.models.usage import GRAIN, TokensSource, UsageStatus
from proxy.spool import Spool, new_attempt_id
from proxy.usage_hours import SUMS
from proxy.usage_rows import Row, insert, usage_row
from tests.support.records import a_final, a_start

AT = datetime(2026, 9, 21, 14, 59, 59, tzinfo=UTC)
HOUR = AT.replace(minute=0, second=0)

Sums = dict[tuple[Any, ...], tuple[int, ...]]


def a_row(**more: Any) -> Row:
    """A usage row as the drainer makes it from a record. cost_nanodollars is put beside, as long as no record has one."""
    key = new_attempt_id()
    at = int(more.pop("at", AT).timestamp() * 1000)
    cost = more.pop("cost_nanodollars", None)
    row = usage_row({**a_start(key, created_at=at), **a_final(key), **more})
    assert row is not None
    return {**row, "cost_nanodollars": cost}


def book(*rows: Row) -> None:
    """Insert rows and add them up, as the drainer does for a segment."""
    with transaction.atomic():
        usage_hours.count(insert(rows))


def stored() -> Sums:
    """All sums, by hour and grain."""
    rows = UsageHour.objects.values_list("hour", *GRAIN, *SUMS)
    return {row[: 1 + len(GRAIN)]: row[1 + len(GRAIN) :] for row in rows}


def rebuild() -> list[datetime]:
    return [hour for hour, _ in usage_hours.rebuild()]


names = st.sampled_from(["", "shop", "Shop", "ünï", "a,b", '["x"]'])
numbers = st.one_of(st.integers(0, 1000), st.sampled_from([-1, 2**45, 2**63, 10**30, 1.5, "many", None]))
ids = st.one_of(st.none(), st.integers(1, 2))
records = st.fixed_dictionaries(
    {
        "at": st.sampled_from(
            [AT, AT + timedelta(seconds=1), AT - timedelta(minutes=59), AT + timedelta(days=40)]
        ),
        "cost_nanodollars": st.one_of(st.none(), st.integers(0, 10**12), st.just(2**62)),
        "attempt": st.integers(1, 3),
        "status": st.sampled_from([*UsageStatus.values, "wonderful"]),
        "tokens_source": st.sampled_from(TokensSource.values),
        **dict.fromkeys(("gateway_key", "owner", "route", "provider", "model", "purpose"), names),
        **dict.fromkeys(("gateway_key_id", "provider_id", "api_key_id"), ids),
        **dict.fromkeys((*usage_hours.TOKENS, "duration_ms", "ttft_ms"), numbers),
    }
)


class MaintainedIsRecomputed(TestCase):
    @settings(deadline=None, max_examples=40)
    @given(batches=st.lists(st.lists(records, max_size=6), max_size=4))
    def test_whatever_was_recorded_maintained_sums_are_those_of_the_records(
        self, batches: list[list[dict[str, Any]]]
    ) -> None:
        for batch in batches:
            book(*(a_row(**record) for record in batch))
        maintained = stored()
        assert (
            sum(sums[SUMS.index("attempts")] for sums in maintained.values()) == UsageRecord.objects.count()
        )
        UsageHour.objects.update(requests=77, attempts=0)

        rebuild()

        assert stored() == maintained


@pytest.mark.django_db
def test_attempts_that_are_alike_are_one_row_of_sums() -> None:
    book(
        a_row(cost_nanodollars=250, tokens_source="estimated"),
        a_row(attempt=2, ttft_ms=None, at=HOUR),
    )
    book(a_row(cached_tokens=1, cache_write_tokens=2, reasoning_tokens=3, duration_ms=60))
    ((grain, sums),) = stored().items()
    assert grain[0] == HOUR
    assert dict(zip(GRAIN, grain[1:], strict=True)) == {
        "gateway_key_id": 7, "gateway_key": "shop", "owner": "", "route": "active:chat", "provider_id": 3, "provider": "local",
        "api_key_id": None, "model": "tiny", "purpose": "chat", "status": "success",
    }  # fmt: skip
    assert dict(zip(SUMS, sums, strict=True)) == {
        "requests": 2, "attempts": 3, "prompt_tokens": 15, "completion_tokens": 27, "cached_tokens": 1, "cache_write_tokens": 2,
        "reasoning_tokens": 3, "cost_nanodollars": 250, "unpriced": 2, "estimated": 1, "duration_ms": 740, "duration_count": 3,
        "ttft_ms": 24, "ttft_count": 2,
    }  # fmt: skip


@pytest.mark.django_db
@pytest.mark.parametrize("name", GRAIN)
def test_attempts_that_differ_in_anything_are_apart(name: str) -> None:
    other: Any = 99 if name.endswith("_id") else "error" if name == "status" else "other"
    book(a_row(), a_row(**{name: other}), a_row(at=AT + timedelta(seconds=1)))
    assert [sums[SUMS.index("attempts")] for sums in stored().values()] == [1, 1, 1]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


def leave(directory: Path, *, number: int = 1, **start: Any) -> None:
    """The records of a worker that has ended."""
    spool = Spool(directory)
    for _ in range(number):
        key = new_attempt_id()
        spool.start(a_start(key, **start))
        spool.finish(a_final(key))
    spool.close()


@pytest.mark.django_db
def test_f32_what_comes_twice_is_added_once(directory: Path) -> None:
    leave(directory, number=3)
    (path,) = directory.glob("*.1")
    shutil.copy(path, path.with_name(f"{uuid.uuid4().hex}.1"))
    usage.drain(directory)
    assert UsageHour.objects.get().attempts == 3


@pytest.mark.django_db
def test_a_segment_that_is_not_booked_adds_nothing(directory: Path) -> None:
    leave(directory)

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if "proxy_usagehour" in sql:
            raise OperationalError("the disk is full")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail), pytest.raises(usage.UsageStoreUnavailable):
        usage.drain(directory)
    assert not UsageRecord.objects.exists()
    usage.drain(directory)
    assert (UsageRecord.objects.count(), UsageHour.objects.get().attempts) == (1, 1)


@pytest.mark.django_db
def test_an_hour_whose_records_were_forgotten_keeps_its_sums() -> None:
    book(a_row(at=AT - timedelta(hours=5)), a_row(at=AT - timedelta(hours=4)), a_row())
    UsageRecord.objects.filter(created_at__lt=HOUR).delete()
    before = stored()
    book(a_row(at=AT + timedelta(hours=1)))
    UsageHour.objects.filter(hour__gt=HOUR).update(attempts=0)

    # The oldest hour that is left may have been forgotten in part.
    assert rebuild() == [HOUR + timedelta(hours=1)]

    assert {grain: sums for grain, sums in stored().items() if grain in before} == before
    assert UsageHour.objects.get(hour__gt=HOUR).attempts == 1


@pytest.mark.django_db
def test_an_hour_of_which_only_late_records_are_left_keeps_its_sums() -> None:
    book(a_row(at=AT - timedelta(hours=5)), a_row(), a_row(model="other"), a_row(at=AT + timedelta(hours=1)))
    UsageRecord.objects.filter(created_at__gte=HOUR, created_at__lte=AT).delete()
    book(a_row())
    before = stored()
    UsageHour.objects.exclude(hour=HOUR).update(requests=77)

    assert rebuild() == [HOUR - timedelta(hours=5), HOUR + timedelta(hours=1)]

    assert stored() == before


@pytest.mark.django_db
def test_the_command_rebuilds_the_hours_it_is_told_to() -> None:
    book(*(a_row(at=AT + timedelta(hours=more)) for more in range(4)))
    UsageHour.objects.update(attempts=0)
    out = StringIO()
    call_command(
        "recompute_usage", "--since", "2026-09-21T15:30+00:00", "--until=2026-09-21T18:00+01:00", stdout=out
    )
    assert "2 hours from 2 records" in out.getvalue()
    attempts = UsageHour.objects.order_by("hour").values_list("attempts", flat=True)
    assert list(attempts) == [0, 1, 1, 0]
    call_command("recompute_usage", "--since=2026-09-21T17:00", stdout=out, verbosity=2)
    assert "2026-09-21T17: 1 records" in out.getvalue()
    assert list(attempts.all()) == [0, 1, 1, 1]
    call_command("recompute_usage", stdout=out)
    assert list(attempts.all()) == [1, 1, 1, 1]


@pytest.mark.django_db
def test_a_command_that_was_interrupted_says_where_to_go_on() -> None:
    book(a_row(), a_row(at=AT + timedelta(hours=1)))
    seen: list[str] = []

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("DELETE"):
            seen.append(sql)
            if len(seen) == 2:
                raise OperationalError("terminating connection")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail), pytest.raises(CommandError, match="--since 2026-09-21T14:00"):
        call_command("recompute_usage", stdout=StringIO())


@pytest.mark.parametrize("wrong", ["yesterday", "2026-13-01", ""])
def test_a_time_that_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(CommandError, match="--since"):
        call_command("recompute_usage", f"--since={wrong}")


# -- several at once


def together(*tasks: Callable[[], object]) -> list[BaseException]:
    """Run them at the same time, each on a connection of its own; what went wrong."""
    troubles: list[BaseException] = []

    def run(task: Callable[[], object]) -> None:
        try:
            task()
        except BaseException as error:
            troubles.append(error)
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return troubles


@pytest.mark.django_db(transaction=True)
def test_two_drainers_and_a_rebuilder_at_once_lose_and_double_nothing(tmp_path: Path) -> None:
    """Each drainer has a spool of its own, as on two machines, and their records belong to the same few hours."""
    one, two = tmp_path / "one", tmp_path / "two"
    now = int(timezone.now().timestamp() * 1000)
    hours = [now - 3_600_000 * ago for ago in range(4)]
    for each in range(12):
        # In opposite orders, so that whoever locks as they come would wait for the other.
        for folder, order in ((one, hours), (two, hours[::-1])):
            spool = Spool(folder)
            for at in order:
                key = new_attempt_id()
                spool.start(a_start(key, created_at=at, model=f"m{each % 3}"))
                spool.finish(a_final(key))
            spool.close()

    def drain(folder: Path) -> None:
        while list(folder.glob("*.1")):
            usage.drain(folder)

    def rebuild_meanwhile() -> None:
        while list(tmp_path.glob("*/*.1")):
            rebuild()

    assert together(lambda: drain(one), lambda: drain(two), rebuild_meanwhile) == []

    maintained = stored()
    assert (
        sum(sums[SUMS.index("attempts")] for sums in maintained.values()) == UsageRecord.objects.count() == 96
    )
    rebuild()
    assert stored() == maintained
