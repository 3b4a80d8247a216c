"""How long usage records are kept: the old ones go in small pieces, the sums stay, and the audit log tells."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import time_machine
from django.conf import LazySettings
from django.db import OperationalError, connection
from django.test.utils import CaptureQueriesContext

from audit.models import Entry, Head
from proxy import retention, tasks, usage_hours
from proxy.models import UsageHour, UsageRecord
from tests.proxy.test_usage_hours import a_row, book

pytestmark = pytest.mark.django_db
NOW = datetime(2026, 9, 21, 14, 30, tzinfo=UTC)
MIDNIGHT = datetime(2026, 9, 14, tzinfo=UTC)


@pytest.fixture(autouse=True)
def _a_week(settings: LazySettings) -> Any:
    settings.USAGE_RETENTION_DAYS = 7
    with time_machine.travel(NOW, tick=True):
        yield


def kept() -> list[str]:
    return list(UsageRecord.objects.order_by("created_at").values_list("request_id", flat=True))


def told() -> list[dict[str, Any]]:
    """What the audit log says of runs."""
    entries = Entry.objects.filter(entity_type="usage_records").order_by("seq")
    return [entry.changes for entry in entries]


def four_records() -> None:
    book(
        a_row(request_id="a", at=MIDNIGHT - timedelta(days=9)),
        a_row(request_id="b", at=MIDNIGHT - timedelta(milliseconds=1)),
        a_row(request_id="c", at=MIDNIGHT),
        a_row(request_id="d", at=NOW),
    )


def test_records_older_than_so_many_whole_days_are_forgotten_and_their_sums_are_not() -> None:
    four_records()
    tasks.forget_usage()
    assert kept() == ["c", "d"]
    assert sum(UsageHour.objects.values_list("attempts", flat=True)) == 4


def test_without_a_limit_all_are_kept(settings: LazySettings) -> None:
    settings.USAGE_RETENTION_DAYS = 0
    four_records()
    tasks.forget_usage()
    assert kept() == ["a", "b", "c", "d"]


def test_a_run_that_forgot_something_is_one_entry_and_others_are_none() -> None:
    four_records()
    retention.forget(seconds=5)
    entry = Entry.objects.get(entity_type="usage_records")
    assert (entry.action, entry.entity_type, entry.entity_name) == (
        "delete_usage_records", "usage_records", "before 2026-09-14",
    )  # fmt: skip
    assert (entry.changes, entry.via, entry.username) == ({"records": [2, 0]}, "task", "")
    version = Head.objects.get().seq
    retention.forget(seconds=5)
    assert (len(told()), Head.objects.get().seq) == (1, version)


def test_each_tick_is_taken_once() -> None:
    tasks.forget_usage()
    four_records()
    tasks.forget_usage()
    assert kept() == ["a", "b", "c", "d"]
    with time_machine.travel(NOW + timedelta(seconds=tasks.TICK_SECONDS)):
        tasks.forget_usage()
    assert kept() == ["c", "d"]


def test_it_forgets_the_oldest_first_in_transactions_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 2)
    book(*(a_row(request_id=str(9 - each), at=MIDNIGHT - timedelta(days=each + 1)) for each in range(5)))
    with CaptureQueriesContext(
        connection,
    ) as captured:
        assert retention.forget(seconds=5) == 5
    deletions = [query["sql"] for query in captured if query["sql"].startswith("DELETE")]
    assert len(deletions) == 3
    assert kept() == []


def test_a_run_ends_when_its_time_is_over_and_the_next_one_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)
    four_records()
    with time_machine.travel(NOW, tick=False):
        clock = iter(range(100))
        monkeypatch.setattr(retention.time, "monotonic", lambda: next(clock))
        monkeypatch.setattr(retention.time, "sleep", lambda seconds: None)
        assert retention.forget(seconds=3) == 1
    assert kept() == ["b", "c", "d"]
    assert told() == [{"records": [1, 0]}]
    assert retention.forget(seconds=30) == 1


@pytest.mark.django_db(transaction=True)
def test_what_was_forgotten_before_the_database_went_away_is_told_all_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(retention, "BATCH", 1)
    four_records()
    seen: list[str] = []

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("DELETE"):
            seen.append(sql)
            if len(seen) == 2:
                raise OperationalError("lock timeout")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail), pytest.raises(OperationalError):
        retention.forget(seconds=30)
    assert told() == [{"records": [1, 0]}]


def test_rebuilding_leaves_the_sums_of_days_that_are_being_forgotten() -> None:
    four_records()
    UsageRecord.objects.filter(request_id="a").delete()
    before = list(
        UsageHour.objects.filter(hour__lt=MIDNIGHT).order_by("hour").values_list("hour", "attempts")
    )
    rebuilt = [hour for hour, _ in usage_hours.rebuild()]
    assert rebuilt == [MIDNIGHT, NOW.replace(minute=0)]
    assert (
        list(UsageHour.objects.filter(hour__lt=MIDNIGHT).order_by("hour").values_list("hour", "attempts"))
        == before
    )
