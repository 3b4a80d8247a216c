"""The drainer: moves what workers left in the spool into usage records, each exactly once.

A segment's records and its name are inserted in one transaction, then the file is unlinked. Killed in between, the next
drainer finds the name and only unlinks. A record is keyed by the id of its attempt, so whatever comes twice counts once.
"""

from __future__ import annotations

import fcntl
import logging
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import timedelta
from pathlib import Path
from typing import Any

from django.db import DatabaseError, DataError, IntegrityError, InterfaceError, connection, transaction
from django.utils import timezone

from proxy import key_use, segments, usage_hours
from proxy.models.usage import SpoolSegment, UsageStatus
from proxy.usage_rows import Row, insert, usage_row

logger = logging.getLogger(__name__)

LOCK_NAME = "drainer.lock"
REJECTED = ".rejected"
"""Suffix of a segment that holds a record which no database took; kept for a person to look at."""
BATCH = 1000
"""Rows per statement."""
SECONDS_BETWEEN_PASSES = 1.0
KEEP_NAMES = timedelta(days=7)
RUBBISH_SECONDS = 60.0


class UsageStoreUnavailable(Exception):
    """The database did not take the records; they stay in the spool."""


@dataclass(frozen=True, slots=True)
class DrainReport:
    """What a pass did. segments: files emptied; records: rows inserted or already there, of which `interrupted` never ended;
    corrupt: lines whose checksum is wrong; rejected: records no database took; waiting: files still in use; busy: another
    drainer has this spool, and nothing was done.
    """

    segments: int = 0
    records: int = 0
    interrupted: int = 0
    corrupt: int = 0
    rejected: int = 0
    waiting: int = 0
    busy: bool = False

    def __add__(self, other: DrainReport) -> DrainReport:
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return DrainReport(**{**sums, "busy": self.busy or other.busy})


def drain(directory: Path) -> DrainReport:
    """Empty every segment that is complete, unless another drainer is at it. UsageStoreUnavailable when the database is away."""
    with _elected(directory) as elected:
        return _one_pass(directory) if elected else DrainReport(busy=True)


def follow(directory: Path, stop: threading.Event, *, interval: float = SECONDS_BETWEEN_PASSES) -> None:
    """Drain every `interval` seconds until `stop` is set; stands by while another drainer has this spool."""
    away = False
    while not stop.is_set():
        with _elected(directory) as elected:
            while elected and not stop.is_set():
                away = _pass_or_wait(directory, stop, was_away=away)
                stop.wait(interval)
        stop.wait(interval)
    connection.close()


def _pass_or_wait(directory: Path, stop: threading.Event, *, was_away: bool) -> bool:
    """One pass; whether the records have to wait. Says so when that changes, not every second that it lasts."""
    try:
        report = _one_pass(directory, stop)
    except (UsageStoreUnavailable, OSError) as error:
        if not was_away:
            logger.error("usage records wait in the spool: %s", error)
        return True
    except Exception:
        # Whatever it was, the records are still there, and the next pass begins with a new connection.
        if not was_away:
            logger.exception("usage records wait in the spool")
        _drop_connections()
        return True
    if was_away:
        logger.info("usage records are taken again")
    if report.records:
        logger.debug("drained %d usage records from %d segments", report.records, report.segments)
    return False


@contextmanager
def _elected(directory: Path) -> Iterator[bool]:
    """Whether we are the one drainer of this spool, for as long as the block lasts (a flock, so death resigns)."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    fd = os.open(directory / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield _lock(fd)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _one_pass(directory: Path, stop: threading.Event | None = None) -> DrainReport:
    _clear_rubbish(directory)
    report = DrainReport()
    try:
        behind = ""
        for worker, number in _segments(directory):
            if stop is not None and stop.is_set():
                return report
            if worker == behind:
                # Later segments only count once the earlier ones are in: what ended there is not interrupted.
                report += DrainReport(waiting=1)
                continue
            one = _drain_segment(directory, worker, number)
            behind = worker if one.waiting else ""
            report += one
        if report.segments:
            _forget_old_names()
    except (DatabaseError, InterfaceError) as error:
        _drop_connections()
        raise UsageStoreUnavailable(str(error).strip() or type(error).__name__) from error
    finally:
        if not connection.in_atomic_block:
            connection.close()
    return report


def _segments(directory: Path) -> list[tuple[str, int]]:
    matches = (segments.SEGMENT_NAME.fullmatch(name) for name in os.listdir(directory))
    return sorted((match[1], int(match[2])) for match in matches if match)


def _drain_segment(directory: Path, worker: str, number: int) -> DrainReport:
    """Insert one segment and unlink it, if its worker let go of it."""
    path = directory / f"{worker}.{number}"
    with path.open("rb") as file:
        if not _lock(file.fileno()):
            return DrainReport(waiting=1)
        _make_commits_durable()
        # Asked after the lock was had: a worker names the next segment before it lets go of this one.
        abandoned = not (directory / f"{worker}.{number + 1}").exists()
        if SpoolSegment.objects.filter(name=path.name).exists():
            path.unlink()
            return DrainReport(segments=1)
        contents = segments.read(file)
        if contents.corrupt:
            logger.error("%d corrupt lines in spool segment %s were skipped", contents.corrupt, path.name)
        records = list(contents.finals.values())
        unfinished = list(contents.open_starts.values()) if abandoned else []
        records += [{**start, "status": UsageStatus.INTERRUPTED} for start in unfinished]
        rejected = _insert(path.name, records)
        if rejected:
            path.rename(path.with_name(path.name + REJECTED))
        else:
            path.unlink()
    return DrainReport(1, len(records) - rejected, len(unfinished), contents.corrupt, rejected)


def _insert(name: str, records: list[dict[str, Any]]) -> int:
    """Insert records and the segment's name in one transaction; how many were rejected."""
    rows = [row for row in map(usage_row, records) if row is not None]
    unusable = len(records) - len(rows)
    if not records:
        return 0
    try:
        with transaction.atomic():
            SpoolSegment.objects.create(name=name, drained_at=timezone.now(), records=len(rows))
            new = [row for first in range(0, len(rows), BATCH) for row in insert(rows[first : first + BATCH])]
            _count(new)
    except (DataError, IntegrityError, ValueError) as error:
        if SpoolSegment.objects.filter(name=name).exists():
            return 0  # somebody else inserted it between our question and our answer
        logger.error("spool segment %s is inserted row by row: %s", name, type(error).__name__)
        return unusable + _insert_singly(name, rows)
    return unusable


def _insert_singly(name: str, rows: list[Row]) -> int:
    """The slow way for a segment with a row that the database does not take: one bad row must not hold up the others."""
    rejected = 0
    with transaction.atomic():
        SpoolSegment.objects.create(name=name, drained_at=timezone.now(), records=len(rows))
        for row in rows:
            try:
                with transaction.atomic():
                    _count(insert([row]))
            except (DataError, IntegrityError, ValueError):
                rejected += 1
                logger.exception("usage record %s was rejected", row["id"])
    return rejected


def _count(new: list[Row]) -> None:
    """Add new rows to all sums; once for a whole transaction, so that two drainers lock the sums in the same order."""
    key_use.count(new)
    usage_hours.count(new)


def _clear_rubbish(directory: Path) -> None:
    """Remove segments that a dead worker had not finished making; everything in them is in the one before."""
    for path in directory.glob(f"*{segments.UNFINISHED}"):
        try:
            with path.open("rb") as file:
                if _lock(file.fileno()) and time.time() - path.stat().st_mtime > RUBBISH_SECONDS:
                    path.unlink()
        except FileNotFoundError:
            continue


def _make_commits_durable() -> None:
    """SQLite in WAL mode syncs a commit only with synchronous=FULL; else a power cut could undo it after the unlink."""
    if connection.vendor == "sqlite" and not connection.in_atomic_block:
        with connection.cursor() as cursor:
            cursor.execute("PRAGMA synchronous=FULL")


def _forget_old_names() -> None:
    """The name of a segment is only needed until its file is gone, which a pass that came this far has seen to."""
    SpoolSegment.objects.filter(drained_at__lt=timezone.now() - KEEP_NAMES).delete()


def _drop_connections() -> None:
    """After a failure nothing is kept: a pooled connection may lead to a server that is no longer the primary (F24)."""
    if connection.in_atomic_block:
        return
    connection.close()
    close_pool = getattr(connection, "close_pool", None)
    if close_pool is not None:
        close_pool()
