"""The drainer: from the spool to rows, exactly once, whoever dies when."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from django.conf import LazySettings
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import IntegrityError, OperationalError, connection
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from proxy import segments, usage
from proxy.models.usage import SpoolSegment, UsageRecord
from proxy.spool import Spool, new_attempt_id
from proxy.usage_rows import COLUMNS, usage_row
from tests.support.records import a_final, a_start

ROOT = Path(__file__).resolve().parents[2]


def an_ended_attempt(spool: Spool, **more: Any) -> str:
    key = new_attempt_id()
    spool.start(a_start(key))
    spool.finish(a_final(key, **more))
    return key


def statuses() -> dict[str, str]:
    return {key.hex: status for key, status in UsageRecord.objects.values_list("id", "status")}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != usage.LOCK_NAME)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def spool(directory: Path) -> Iterator[Spool]:
    """A living worker's spool; it rotates at every tick that has something to say."""
    spool = Spool(directory, segment_seconds=0)
    yield spool
    spool.close()


# -- rows


@pytest.mark.django_db
def test_a_final_record_becomes_a_row_with_all_its_fields(spool: Spool, directory: Path) -> None:
    key = an_ended_attempt(spool, trace=[{"provider": "local", "why": "active"}])
    spool.close()
    usage.drain(directory)
    row = UsageRecord.objects.get()
    expected = {**a_start(key), **a_final(key), "trace": [{"provider": "local", "why": "active"}]}
    expected |= {"id": uuid.UUID(key), "created_at": datetime(2026, 9, 21, 14, 13, 20, 123_000, tzinfo=UTC)}
    expected |= {"cost_nanodollars": None, "price_id": None}
    assert {field.name: getattr(row, field.name) for field in UsageRecord._meta.fields} == expected
    assert row.total_tokens == 14


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
FIELDS = st.sampled_from([field.name for field in UsageRecord._meta.fields if field.name != "id"])


@given(record=st.dictionaries(FIELDS, anything, max_size=12))
def test_whatever_is_in_a_record_makes_a_row_that_keeps_the_rules(record: dict[str, Any]) -> None:
    values = usage_row({**record, "id": new_attempt_id()})
    assert values is not None
    assert set(values) == set(COLUMNS)
    row = UsageRecord(**values)
    row.full_clean(validate_unique=False, validate_constraints=False)
    for name in (
        "prompt_tokens",
        "completion_tokens",
        "cached_tokens",
        "bytes_out",
        "ttft_ms",
        "duration_ms",
        "attempt",
    ):
        assert 0 <= (getattr(row, name) or 0) < 2**63
    assert 0 <= row.attempt < 2**15
    assert 1970 <= row.created_at.year <= 9999


NASTY: dict[str, dict[str, Any]] = {
    "negative tokens": {"prompt_tokens": -1},
    "tokens beyond 64 bits": {"completion_tokens": 10**30},
    "tokens that are text": {"cached_tokens": "many"},
    "a float": {"prompt_tokens": 1e300},
    "an unknown status": {"status": "wonderful"},
    "an unknown source": {"tokens_source": "the moon"},
    "an absurd HTTP status": {"http_status": 10**6},
    "a negative time": {"ttft_ms": -5},
}


@pytest.mark.django_db
@pytest.mark.parametrize("nasty", NASTY.values(), ids=NASTY.keys())
def test_a_value_out_of_range_is_clamped_and_named_in_the_trace(
    nasty: dict[str, Any], spool: Spool, directory: Path
) -> None:
    an_ended_attempt(spool, **nasty)
    spool.close()
    assert usage.drain(directory).rejected == 0
    row = UsageRecord.objects.get()
    assert row.trace == {"trace": None, "usage_invalid": list(nasty)}
    row.full_clean(validate_unique=False)


@pytest.mark.django_db
def test_text_that_databases_refuse_or_is_too_long_is_kept_as_far_as_it_goes(
    spool: Spool, directory: Path
) -> None:
    nasty = "a\0b\ud800" + "x" * 1000
    deep: Any = "end"
    for _ in range(200):
        deep = [deep]
    key = new_attempt_id()
    spool.start(a_start(key, requested_model=nasty, request_id=nasty))
    spool.finish(a_final(key, error_code=nasty, trace={"say\0": [nasty, deep, float("inf")]}))
    spool.close()
    assert usage.drain(directory).records == 1
    row = UsageRecord.objects.get()
    assert row.requested_model.startswith("ab?xxx")
    assert len(row.requested_model) == 255
    assert list(row.trace or ()) == ["say"]


@pytest.mark.django_db
def test_a_record_without_a_usable_id_is_kept_aside_and_holds_up_nobody(
    spool: Spool, directory: Path
) -> None:
    key = an_ended_attempt(spool)
    spool.start(a_start("no-uuid"))
    spool.finish(a_final("no-uuid"))
    spool.close()
    report = usage.drain(directory)
    assert (report.records, report.rejected) == (1, 1)
    assert statuses() == {key: "success"}
    assert names(directory) == [f"{spool.worker}.1{usage.REJECTED}"]
    assert usage.drain(directory) == usage.DrainReport()


@contextmanager
def database_refusing(key: str) -> Iterator[None]:
    """Every statement that brings this attempt fails, as it would for a broken rule."""

    def refuse(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if sql.startswith("INSERT") and (key in str(params) or str(uuid.UUID(key)) in str(params)):
            raise IntegrityError("a rule is broken")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(refuse):
        yield


@pytest.mark.django_db
def test_a_row_that_no_database_takes_is_kept_aside_and_the_others_are_inserted(
    spool: Spool, directory: Path
) -> None:
    keys = [an_ended_attempt(spool) for _ in range(3)]
    spool.close()
    with database_refusing(keys[1]):
        report = usage.drain(directory)
    assert (report.records, report.rejected) == (2, 1)
    assert statuses() == {keys[0]: "success", keys[2]: "success"}
    assert names(directory) == [f"{spool.worker}.1{usage.REJECTED}"]


# -- segments


@pytest.mark.django_db
def test_a_living_workers_open_segment_is_left_alone(spool: Spool, directory: Path) -> None:
    an_ended_attempt(spool)
    assert usage.drain(directory) == usage.DrainReport(waiting=1)
    assert UsageRecord.objects.count() == 0
    assert len(names(directory)) == 1


@pytest.mark.django_db
def test_a_start_that_moved_on_is_not_interrupted_while_its_worker_lives(
    spool: Spool, directory: Path
) -> None:
    running = new_attempt_id()
    spool.start(a_start(running))
    for _ in range(3):
        an_ended_attempt(spool)
        spool.tick()
        usage.drain(directory)
    assert set(statuses().values()) == {"success"}
    spool.finish(a_final(running, status="client_disconnected"))
    spool.tick()
    usage.drain(directory)
    assert statuses()[running] == "client_disconnected"


@pytest.mark.django_db
def test_f32_the_open_starts_of_a_dead_worker_become_interrupted(spool: Spool, directory: Path) -> None:
    running = new_attempt_id()
    spool.start(a_start(running))
    ended = an_ended_attempt(spool)
    spool.close()
    report = usage.drain(directory)
    assert statuses() == {running: "interrupted", ended: "success"}
    assert report == usage.DrainReport(segments=1, records=2, interrupted=1)
    row = UsageRecord.objects.get(id=running)
    assert (row.tokens_source, row.total_tokens, row.gateway_key, row.trace) == ("none", 0, "shop", None)
    assert names(directory) == []


@pytest.mark.django_db
def test_f26_a_torn_last_line_is_ignored(spool: Spool, directory: Path) -> None:
    running = new_attempt_id()
    spool.start(a_start(running))
    spool.close()
    (path,) = directory.iterdir()
    path.write_bytes(path.read_bytes() + segments.encode({**a_final(running), "t": "final"})[:-9] + bytes(50))
    report = usage.drain(directory)
    assert statuses() == {running: "interrupted"}
    assert report.corrupt == 0


@pytest.mark.django_db
def test_f26_a_corrupt_line_in_the_middle_is_counted_and_skipped(
    spool: Spool, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = an_ended_attempt(spool)
    second = an_ended_attempt(spool)
    spool.close()
    (path,) = directory.iterdir()
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], lines[2].replace(b"tiny", b"tinz"), *lines[3:]]))
    report = usage.drain(directory)
    assert statuses() == {first: "success", second: "success"}
    assert report.corrupt == 1
    assert "1 corrupt lines" in caplog.text


@pytest.mark.django_db
def test_f32_a_drainer_killed_between_commit_and_unlink_counts_nothing_twice(
    spool: Spool, directory: Path
) -> None:
    key = an_ended_attempt(spool)
    spool.close()
    (path,) = directory.iterdir()
    left_over = path.with_name("left-over")
    os.link(path, left_over)
    usage.drain(directory)
    left_over.rename(path)
    UsageRecord.objects.filter(id=key).update(prompt_tokens=77)
    report = usage.drain(directory)
    assert report.records == 0
    assert UsageRecord.objects.get().prompt_tokens == 77
    assert names(directory) == []


@pytest.mark.django_db
def test_a_record_that_comes_in_two_segments_counts_once(spool: Spool, directory: Path) -> None:
    key = an_ended_attempt(spool)
    spool.close()
    (path,) = directory.iterdir()
    shutil.copy(path, path.with_name(f"{uuid.uuid4().hex}.1"))
    usage.drain(directory)
    assert statuses() == {key: "success"}
    assert SpoolSegment.objects.count() == 2


@pytest.mark.django_db
def test_later_segments_wait_for_an_earlier_one_that_is_still_held(spool: Spool, directory: Path) -> None:
    an_ended_attempt(spool)
    spool.tick()
    an_ended_attempt(spool)
    spool.close()
    with (directory / f"{spool.worker}.1").open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert usage.drain(directory) == usage.DrainReport(waiting=2)
    assert usage.drain(directory).records == 2


@pytest.mark.django_db
def test_an_unfinished_segment_of_a_dead_worker_is_removed_when_it_is_old(directory: Path) -> None:
    directory.mkdir()
    path = directory / f"{uuid.uuid4().hex}.2{segments.UNFINISHED}"
    path.write_bytes(segments.encode({**a_start(new_attempt_id()), "t": "start"}))
    usage.drain(directory)
    assert path.exists()
    os.utime(path, (time.time() - 3600,) * 2)
    usage.drain(directory)
    assert not path.exists()
    assert UsageRecord.objects.count() == 0


@pytest.mark.django_db
def test_names_of_segments_are_forgotten_after_a_while(spool: Spool, directory: Path) -> None:
    SpoolSegment.objects.create(name="old", drained_at=timezone.now() - usage.KEEP_NAMES - timedelta(hours=1))
    an_ended_attempt(spool)
    spool.close()
    usage.drain(directory)
    assert [segment.name for segment in SpoolSegment.objects.all()] == [f"{spool.worker}.1"]


# -- several drainers


@pytest.mark.django_db
def test_of_two_drainers_one_works_and_the_other_keeps_out(spool: Spool, directory: Path) -> None:
    an_ended_attempt(spool)
    spool.close()
    with (directory / usage.LOCK_NAME).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert usage.drain(directory) == usage.DrainReport(busy=True)
        assert UsageRecord.objects.count() == 0
    assert usage.drain(directory).records == 1


@pytest.mark.django_db(transaction=True)
def test_a_follower_stands_by_and_takes_over_when_the_other_dies(spool: Spool, directory: Path) -> None:
    key = an_ended_attempt(spool)
    spool.close()
    stop = threading.Event()
    other = (directory / usage.LOCK_NAME).open("w")
    fcntl.flock(other, fcntl.LOCK_EX)
    released = threading.Timer(0.2, other.close)
    released.start()
    stopper = _when(lambda: not list(directory.glob("*.1")), stop.set)
    usage.follow(directory, stop, interval=0.01)
    stopper.join()
    assert statuses() == {key: "success"}


# -- the database is away


@contextmanager
def database_away() -> Iterator[list[bool]]:
    """Every statement of this thread fails while the list holds True; Django's own hook for instrumentation does it."""
    away = [True]

    def fail(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        if away[0]:
            raise OperationalError("the server closed the connection unexpectedly")
        return execute(sql, params, many, context)

    with connection.execute_wrapper(fail):
        yield away


@pytest.mark.django_db
def test_f22_while_the_database_is_away_the_records_stay_in_the_spool(spool: Spool, directory: Path) -> None:
    an_ended_attempt(spool)
    spool.close()
    before = [path.read_bytes() for path in directory.glob("*.1")]
    with database_away(), pytest.raises(usage.UsageStoreUnavailable):
        usage.drain(directory)
    assert [path.read_bytes() for path in directory.glob("*.1")] == before
    assert usage.drain(directory).records == 1


@pytest.mark.django_db(transaction=True)
def test_f22_a_follower_says_once_that_the_database_is_away_and_once_that_it_is_back(
    spool: Spool, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    key = an_ended_attempt(spool)
    spool.close()
    stop = threading.Event()
    with database_away() as away:
        back = threading.Timer(0.3, lambda: away.__setitem__(0, False))
        back.start()
        stopper = _when(lambda: "taken again" in caplog.text, stop.set)
        usage.follow(directory, stop, interval=0.01)
        stopper.join()
    assert statuses() == {key: "success"}
    assert caplog.text.count("wait in the spool") == 1
    assert caplog.text.count("taken again") == 1


def _when(condition: Callable[[], bool], act: Callable[[], None]) -> threading.Thread:
    """Call `act` once `condition` holds, or after ten seconds, so that a failing test ends."""

    def watch() -> None:
        deadline = time.monotonic() + 10
        while not condition() and time.monotonic() < deadline:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


# -- the command


@pytest.mark.django_db
def test_the_command_drains_once_and_says_what_it_did(
    spool: Spool, directory: Path, settings: LazySettings
) -> None:
    settings.SPOOL_DIR = directory
    an_ended_attempt(spool)
    spool.close()
    out = StringIO()
    call_command("drain_usage", stdout=out)
    assert "Drained 1 records (0 interrupted) from 1 segments" in out.getvalue()


@pytest.mark.django_db
def test_the_command_ends_with_one_line_when_the_database_is_away(
    spool: Spool, directory: Path, settings: LazySettings
) -> None:
    settings.SPOOL_DIR = directory
    an_ended_attempt(spool)
    spool.close()
    with database_away(), pytest.raises(CommandError, match="stay in the spool"):
        call_command("drain_usage", stdout=StringIO())


@pytest.mark.django_db(transaction=True)
def test_the_following_command_stops_on_sigterm(
    spool: Spool, directory: Path, settings: LazySettings
) -> None:
    settings.SPOOL_DIR = directory
    key = an_ended_attempt(spool)
    spool.close()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stopper = _when(lambda: not list(directory.glob("*.1")), lambda: os.kill(os.getpid(), signal.SIGTERM))
    try:
        call_command("drain_usage", "--follow")
    finally:
        stopper.join()
        for number, handler in before.items():
            signal.signal(number, handler)
    assert statuses() == {key: "success"}


# -- kill -9

WRITER = """
    import os, random, sys, time
    from pathlib import Path
    from proxy.spool import Spool, new_attempt_id

    spool = Spool(Path(sys.argv[1]), segment_seconds=0, tick_seconds=0.002)
    choose = random.Random(int(sys.argv[2]))
    spool.run()
    running = []
    while True:
        time.sleep(choose.random() / 1000)  # so that there is more dying than draining
        if len(running) < 20 and choose.random() < 0.5:
            running.append(new_attempt_id())
            spool.start({"id": running[-1], "attempt": 1, "created_at": 1790000000123, "model": "tiny"})
            os.write(1, b"began " + running[-1].encode() + b"\\n")
        elif running:
            key = running.pop(choose.randrange(len(running)))
            os.write(1, b"ending " + key.encode() + b"\\n")
            spool.finish({"id": key, "status": "success", "prompt_tokens": 3, "trace": ["t" * choose.randrange(3000)]})
            os.write(1, b"ended " + key.encode() + b"\\n")
"""


def kill_a_writer(directory: Path, seed: int, meanwhile: Callable[[], object]) -> dict[str, set[str]]:
    """Let a worker write, kill it at a random moment, and return what it told us: ids by the last word about them."""
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(directory), str(seed)]
    ledger = directory.parent / f"ledger-{seed}"
    with ledger.open("wb") as out, subprocess.Popen(command, cwd=ROOT, stdout=out) as worker:
        deadline = time.monotonic() + 20
        while ledger.stat().st_size == 0 and time.monotonic() < deadline:
            time.sleep(0.005)
        end = time.monotonic() + random.Random(seed).uniform(0, 0.1)
        while time.monotonic() < end:
            meanwhile()
        os.kill(worker.pid, signal.SIGKILL)
    said: dict[str, set[str]] = {"began": set(), "ending": set(), "ended": set()}
    for line in ledger.read_text().splitlines():
        word, key = line.split()
        said[word].add(key)
    assert said["began"]
    return said


@pytest.mark.django_db(transaction=True)
def test_f32_kill_9_of_a_worker_at_any_point_leaves_exactly_one_row_for_each_attempt(directory: Path) -> None:
    """30 kills, while segments rotate as fast as they can and a drainer runs beside."""
    base = random.randrange(10**6)
    began, ending, ended = set[str](), set[str](), set[str]()
    for kill in range(30):
        said = kill_a_writer(directory, base + kill, lambda: usage.drain(directory))
        began |= said["began"]
        ending |= said["ending"]
        ended |= said["ended"]
        usage.drain(directory)
    rows = statuses()
    wrong = {
        "lost": began - set(rows),
        "ended, but not recorded so": {key for key in ended if rows.get(key) != "success"},
        "never ended, but recorded so": {key for key in began - ending if rows.get(key) != "interrupted"},
        # A worker may die after writing a start and before telling us: at most one for each kill.
        "unheard of": set() if len(set(rows) - began) <= 30 else set(rows) - began,
    }
    assert not any(wrong.values()), json.dumps(
        {"seed": base, **{key: sorted(ids) for key, ids in wrong.items()}}
    )
    assert UsageRecord.objects.count() == len(rows)
    assert began - ending, "no kill left an attempt open: the test shows nothing"
    assert len(ended) > 100
    assert {Path(name).suffix for name in names(directory)} <= {segments.UNFINISHED}


@pytest.mark.django_db(transaction=True)
def test_two_drainers_on_one_pile_insert_each_record_once(directory: Path) -> None:
    keys = set()
    for _ in range(5):
        spool = Spool(directory, segment_seconds=0)
        for _ in range(10):
            keys.add(an_ended_attempt(spool))
            spool.tick()
        spool.close()
    reports: list[usage.DrainReport] = []

    def work() -> None:
        try:
            while names(directory):
                reports.append(usage.drain(directory))
        finally:
            connection.close()

    drainers = [threading.Thread(target=work) for _ in range(2)]
    for thread in drainers:
        thread.start()
    for thread in drainers:
        thread.join()
    assert set(statuses()) == keys
    assert sum(report.records for report in reports) == len(keys)
