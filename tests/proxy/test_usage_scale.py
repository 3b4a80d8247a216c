"""Millions of usage records: reports and lists stay fast, retention stays small. The short form has fewer and asks for the plans."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from proxy import retention, usage, usage_hours
from proxy.models import UsageHour, UsageRecord
from proxy.spool import Spool, new_attempt_id
from tests.support.api import V1, as_
from tests.support.records import a_final, a_start
from tests.support.soak import say
from tests.support.usage_fill import DAYS, MONTH, fill, vacuum

pytestmark = pytest.mark.django_db

MOST_QUERIES = 12
MONTH_ASKED = {"since": MONTH.isoformat(), "until": (MONTH + timedelta(days=DAYS)).isoformat()}
SUMMARIES: tuple[dict[str, str], ...] = (
    {"group_by": "key"},
    {"group_by": "provider,model"},
    {"bucket": "day"},
    {"bucket": "day", "group_by": "key"},
    {"group_by": "owner,status"},
)
LISTS: tuple[dict[str, str], ...] = (
    {},
    {"gateway_key": "7"},
    {"provider": "3"},
    {"since": "2026-09-12T00:00:00Z", "until": "2026-09-13T00:00:00Z"},
)
SIFTED: tuple[dict[str, str], ...] = (
    {"status": "error"},
    {"owner": "user3"},
    {"model": "model-5"},
    {"gateway_key": "7", "status": "client_disconnected"},
)
"""No index knows these by themselves: their first page is there at once, and counting up to 100,000 takes what it takes."""
NOBODYS: tuple[dict[str, str], ...] = (
    {"gateway_key": "no such key"},
    {"owner": "nobody"},
    {"model": "no-such-model"},
    {"status": "upstream_stalled"},
)
"""What no record has: the longest way through an index that does not know it."""


def fastest(act: Callable[[], object], times: int = 5) -> float:
    """Milliseconds of the fastest of several tries: what it costs, without what else this machine does."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        act()
        took.append(time.perf_counter() - began)
    return min(took) * 1000


@contextmanager
def at_most_queries(most: int) -> Iterator[None]:
    with CaptureQueriesContext(connection) as captured:
        yield
    assert len(captured) <= most, [query["sql"][:200] for query in captured]


def asked(client: Any, path: str, wanted: dict[str, str]) -> Any:
    answer = client.get(f"{V1}/{path}", wanted)
    assert answer.status_code == 200, answer.content
    return answer.json()


def admin_list(client: Client, **wanted: str) -> Any:
    answer = client.get(reverse("admin:proxy_usagerecord_changelist"), wanted)
    assert answer.status_code == 200
    return answer


def peak() -> int:
    """The most memory that this process ever had, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def plan_of(rows: Any) -> str:
    return str(rows.explain())


# -- the short form


@pytest.fixture
def filled(db: None) -> None:
    fill(50_000, days=1)
    for _ in usage_hours.rebuild():
        pass


@pytest.mark.parametrize("path", ["usage", "usage/summary"])
def test_first_pages_take_few_queries(filled: None, viewer: User, path: str) -> None:
    wanted = {"page_size": "200"} if path == "usage" else {**MONTH_ASKED, "group_by": "key", "bucket": "day"}
    client = as_(viewer)
    with at_most_queries(MOST_QUERIES):
        asked(client, path, wanted)


def test_the_list_of_the_admin_takes_few_queries_and_none_reads_all(filled: None, viewer: User) -> None:
    client = Client()
    client.force_login(viewer)
    with CaptureQueriesContext(connection) as captured:
        admin_list(client)
    assert len(captured) <= MOST_QUERIES
    about_records = [query["sql"] for query in captured if "proxy_usagerecord" in query["sql"]]
    assert about_records
    assert [sql for sql in about_records if "LIMIT" not in sql] == []


def test_what_is_asked_most_is_found_by_an_index(filled: None) -> None:
    newest = UsageRecord.objects.order_by("-created_at", "-id")
    for rows, index in (
        (newest[:50], "usage_created"),
        (newest.filter(gateway_key_id=7)[:50], "usage_gateway_key_created"),
        (newest.filter(provider_id=999)[:50], "usage_provider_created"),
        (newest.filter(created_at__gte=MONTH + timedelta(hours=23)), "usage_created"),
        (UsageRecord.objects.filter(request_id="request-77"), "usage_request"),
        (
            UsageRecord.objects.filter(created_at__lt=MONTH + timedelta(hours=1)).order_by("created_at")[
                :1000
            ],
            "usage_created",
        ),
    ):
        assert index in plan_of(rows), plan_of(rows)


def test_a_summary_of_a_month_never_reads_records(filled: None, viewer: User) -> None:
    client = as_(viewer)
    with CaptureQueriesContext(connection) as captured:
        found = asked(client, "usage/summary", {**MONTH_ASKED, "group_by": "key"})
    assert [query["sql"] for query in captured if "proxy_usagerecord" in query["sql"]] == []
    assert len(found["results"]) == 50
    assert found["totals"]["attempts"] == 50_000


# -- the long form


def drained(folder: Path, number: int) -> float:
    """Seconds to book so many records of one worker, now."""
    spool = Spool(folder, segment_seconds=3600)
    now = int((MONTH + timedelta(days=DAYS)).timestamp() * 1000)
    for each in range(number):
        key = new_attempt_id()
        more = {
            "gateway_key_id": each % 50 + 1,
            "gateway_key": f"key {each % 50 + 1}",
            "model": f"model-{each % 3}",
        }
        spool.start(a_start(key, created_at=now + each, **more))
        spool.finish(a_final(key))
        if each % 1000 == 999:
            spool.tick()
    spool.close()
    began = time.perf_counter()
    while any(folder.glob(f"{spool.worker}.*")):
        usage.drain(folder)
    return time.perf_counter() - began


@pytest.mark.soak
@pytest.mark.timeout(5400)
@pytest.mark.django_db(transaction=True)
def test_millions_of_records(viewer: User, tmp_path: Path, settings: LazySettings) -> None:
    postgresql = connection.vendor == "postgresql"
    number = 5_000_000 if postgresql else 1_000_000
    empty = drained(tmp_path / "empty", 20_000)
    began = time.perf_counter()
    fill(number)
    filling = time.perf_counter() - began
    began = time.perf_counter()
    for _ in usage_hours.rebuild(until=MONTH + timedelta(days=DAYS)):
        pass
    say(
        database=connection.vendor, records=f"{number:,}", filled=f"in {filling:.0f} s",
        rebuilt=f"in {time.perf_counter() - began:.0f} s", sums=f"{UsageHour.objects.count():,}",
    )  # fmt: skip
    if postgresql:
        vacuum()
    full = drained(tmp_path / "full", 20_000)
    say(booked_20000=f"{empty:.1f} s when empty, {full:.1f} s when full")

    api, admin = as_(viewer), Client()
    admin.force_login(viewer)
    slow: dict[str, float] = {}

    def measured(what: str, act: Callable[[], object], most: float) -> None:
        took = fastest(act)
        say(**{what.replace(" ", "_"): f"{took:.0f} ms"})
        if took > most:
            slow[what] = took

    for wanted in SUMMARIES:
        measured(
            f"summary {json.dumps(wanted)}",
            partial(asked, api, "usage/summary", {**MONTH_ASKED, **wanted}),
            300 if postgresql else 600,
        )
    for wanted in LISTS:
        measured(f"list {json.dumps(wanted)}", partial(asked, api, "usage", wanted), 200)
    for wanted in SIFTED:
        measured(f"list {json.dumps(wanted)}", partial(asked, api, "usage", wanted), 3_000)
    for wanted in NOBODYS:
        measured(f"list {json.dumps(wanted)}", partial(asked, api, "usage", wanted), 10_000)
    measured("admin list", lambda: admin_list(admin), 400)
    measured("admin one request", lambda: admin_list(admin, q="request-77"), 400)

    settings.USAGE_RETENTION_DAYS = 1  # all of them are older
    before, left = peak(), UsageRecord.objects.count()
    began = time.perf_counter()
    forgotten = retention.forget(seconds=60)
    took, grown = time.perf_counter() - began, (peak() - before) / 2**20
    say(forgotten=f"{forgotten:,} in {took:.0f} s, half of it pauses", memory=f"{grown:.1f} MiB more")
    assert UsageRecord.objects.count() == left - forgotten and forgotten > 1000
    assert grown < 100
    assert full < 2 * empty + 2
    assert slow == {}
