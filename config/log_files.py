"""JSON lines in LOG_DIR: written by every process of the machine into one file, rotated, and read from their end.

Under `make run` supervisord keeps a file for each program instead (config/supervisor.conf); both are read.
"""

from __future__ import annotations

import contextlib
import fcntl
import heapq
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import orjson

from config.logs import redact

NAME = "penstock"
PROGRAMS = (NAME, "web", "worker", "beat", "drainer")
MAX_BYTES = 10 * 1000 * 1000
BACKUPS = 10
BLOCK = 64 * 1024
MAX_LINE = 64 * 1024
"""Bytes; of a longer line nothing but its end is looked at."""
DISORDER = 60.0
"""Seconds by which lines of one file may be out of order."""
MOST_READ = 16 * 1024 * 1024
"""Bytes of files that one question reads."""
MOST_ANSWERED = 4 * 1024 * 1024
LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}


class SharedFile(logging.Handler):
    """Appends each line with one write, which the kernel puts behind those of other processes.

    Whoever finds the file full renames it, under a lock that nobody else needs; the others notice by its new inode. A line that
    cannot be written is on standard error all the same.
    """

    def __init__(self, path: str, *, max_bytes: int = MAX_BYTES, backups: int = BACKUPS) -> None:
        super().__init__()
        self._path, self._max_bytes, self._backups = Path(path), max_bytes, backups
        self._file: int | None = None

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record).encode("utf-8", "backslashreplace") + b"\n"
            with contextlib.suppress(OSError):
                if os.fstat(self._current()).st_size + len(line) > self._max_bytes:
                    self._rotate(len(line))
                os.write(self._current(), line)
        except Exception:  # noqa: BLE001 -- the way of every handler of logging
            self.handleError(record)

    def close(self) -> None:
        self._forget()
        super().close()

    def _current(self) -> int:
        """The file that the path names now."""
        if self._file is not None and not _same(self._file, self._path):
            self._forget()
        if self._file is None:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        return self._file

    def _forget(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _rotate(self, wanted: int) -> None:
        lock = os.open(f"{self._path}.lock", os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._path.exists() or self._path.stat().st_size + wanted <= self._max_bytes:
                return  # Another process has just done it, and maybe nobody has written since.
            for number in range(self._backups, 0, -1):
                older, newer = f"{self._path}.{number}", f"{self._path}.{number - 1}"
                with contextlib.suppress(FileNotFoundError):
                    os.replace(newer if number > 1 else self._path, older)
        finally:
            os.close(lock)


def _same(file: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    held = os.fstat(file)
    return (named.st_dev, named.st_ino) == (held.st_dev, held.st_ino)


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Wanted:
    """level: this and what is graver. since: nothing older. limit: lines."""

    limit: int
    level: str = ""
    request_id: str = ""
    since: datetime | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """lines: the newest first, without secrets. truncated: there may be more, but looking for them would take too long."""

    lines: list[dict[str, Any]]
    truncated: bool


@dataclass(slots=True)
class _Budget:
    """Bytes that may still be read."""

    left: int


def newest(folder: Path, wanted: Wanted) -> Found:
    """The lines of all programs that are asked for, in the order of their times."""
    budget, size = _Budget(MOST_READ), 0
    lines: list[dict[str, Any]] = []
    programs = (_entries(folder, program, wanted, budget) for program in PROGRAMS)
    for _, line in heapq.merge(*programs, key=lambda pair: pair[0], reverse=True):
        size += len(orjson.dumps(line))
        if size > MOST_ANSWERED:
            return Found(lines, truncated=True)
        lines.append(line)
        if len(lines) == wanted.limit:
            break
    return Found(lines, truncated=budget.left <= 0)


def _entries(
    folder: Path, program: str, wanted: Wanted, budget: _Budget
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a program with their times, the newest first. A line that is no JSON has the time of the one after it."""
    since, long_before = (_written(wanted.since, less=seconds) for seconds in (0, DISORDER))
    sought, at = wanted.request_id.encode(), "9999"
    for raw in _backwards(folder / f"{program}.log", budget):
        if sought not in raw:
            continue
        event = _event(raw)
        at = event["timestamp"] or at
        if at < long_before:
            return
        if at >= since and _is_wanted(event, wanted):
            yield at, {**redact(event), "program": program}


def _written(moment: datetime | None, *, less: float) -> str:
    """A time as it is in the files; before all of them when there is none."""
    if moment is None:
        return ""
    return (moment - timedelta(seconds=less)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _is_wanted(event: dict[str, Any], wanted: Wanted) -> bool:
    if wanted.request_id and event.get("request_id") != wanted.request_id:
        return False
    return not wanted.level or LEVELS.get(event["level"] or "", 0) >= LEVELS[wanted.level]


def _event(raw: bytes) -> dict[str, Any]:
    """What a process wrote as JSON; any other line as a message. timestamp and level are text or None."""
    try:
        event = orjson.loads(raw)
    except orjson.JSONDecodeError:
        event = None
    if not isinstance(event, dict) or "message" not in event:
        event = {"message": raw.decode("utf-8", "replace")}
    timestamp, level = event.get("timestamp"), event.get("level")
    event["timestamp"] = timestamp if isinstance(timestamp, str) else None
    event["level"] = level.upper() if isinstance(level, str) else None
    return event


def _backwards(path: Path, budget: _Budget) -> Iterator[bytes]:
    """The lines of a file and of those it was before, from the end, a block in memory at a time."""
    seen: set[tuple[int, int]] = set()
    for name in (path, *(path.with_name(f"{path.name}.{number}") for number in range(1, BACKUPS + 1))):
        try:
            file = name.open("rb")
        except OSError:
            continue
        with file:
            held = os.fstat(file.fileno())
            if (held.st_dev, held.st_ino) in seen:
                continue  # It was renamed while we read it.
            seen.add((held.st_dev, held.st_ino))
            rest, end = b"", held.st_size
            while end > 0 and budget.left > 0:
                start = max(0, end - BLOCK)
                file.seek(start)
                block = file.read(end - start)
                budget.left -= len(block)
                end = start
                first, *whole = (block + rest).split(b"\n")
                yield from (line for line in reversed(whole) if line.strip())
                rest = first[-MAX_LINE:]
            if rest.strip() and budget.left > 0:
                yield rest
