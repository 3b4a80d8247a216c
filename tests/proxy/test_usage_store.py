"""When the database has no room for usage, or somebody holds its tables: nothing is lost, nobody waits for long (F25, F26)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.db import OperationalError, connection

from proxy import retention, usage
from proxy.models import UsageHour, UsageRecord
from tests.proxy.test_usage_hours import leave
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@contextmanager
def full_disk() -> Iterator[None]:
    """SQLite's own limit of its file, for one connection: beyond it, the disk is full. There is room for the next connection."""
    with connection.cursor() as cursor:
        cursor.execute("PRAGMA page_count")
        (pages,) = cursor.fetchone()
        cursor.execute(f"PRAGMA max_page_count = {pages}")
    yield
    connection.close()


@contextmanager
def held(table: str) -> Iterator[None]:
    """Somebody has locked the table and does not let go."""
    given = connection.settings_dict
    names = {"host": "HOST", "port": "PORT", "user": "USER", "password": "PASSWORD", "dbname": "NAME"}
    with psycopg.connect(**{name: given[key] for name, key in names.items()}) as other:
        other.execute(f"LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE".encode())
        yield
        other.rollback()


def booked() -> tuple[int, int]:
    return UsageRecord.objects.count(), sum(UsageHour.objects.values_list("attempts", flat=True))


def test_f26_a_full_disk_leaves_records_in_the_spool_until_there_is_room(directory: Path) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("SQLite can be told how large its file may grow")
    leave(directory, number=3000)
    files = {path: path.read_bytes() for path in directory.glob("*.1")}
    with full_disk(), pytest.raises(usage.UsageStoreUnavailable, match="full"):
        usage.drain(directory)
    assert {path: path.read_bytes() for path in directory.glob("*.1")} == files
    assert booked() == (0, 0)
    assert usage.drain(directory).records == 3000
    assert booked() == (3000, 3000)


@pytest.mark.parametrize("table", ["proxy_usagerecord", "proxy_usagehour"])
def test_f25_a_table_that_somebody_holds_keeps_nobody_waiting_for_long(
    directory: Path, viewer: User, table: str
) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has no locks on tables")
    leave(directory)
    client = as_(viewer)
    path = "usage" if table == "proxy_usagerecord" else "usage/summary"
    with held(table):
        began = time.monotonic()
        with pytest.raises(usage.UsageStoreUnavailable, match="lock timeout"):
            usage.drain(directory)
        answer = client.get(f"{V1}/{path}")
        assert (answer.status_code, error(answer)["code"]) == (503, "SERVICE_UNAVAILABLE")
        assert answer["Retry-After"]
        assert time.monotonic() - began < 15
    assert usage.drain(directory).records == 1
    assert booked() == (1, 1)


def test_f25_retention_gives_up_while_somebody_holds_the_records(settings: LazySettings) -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has no locks on tables")
    settings.USAGE_RETENTION_DAYS = 1
    with held("proxy_usagerecord"), pytest.raises(OperationalError, match="lock timeout"):
        retention.forget(seconds=30)
