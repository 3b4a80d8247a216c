"""Log files that several processes write and rotate, and that are read from their end."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import time
from datetime import UTC, datetime
from pathlib import Path

import orjson
import pytest

from config import log_files
from config.log_files import SharedFile, Wanted, newest

pytestmark = pytest.mark.no_database


def record(text: str) -> logging.LogRecord:
    return logging.LogRecord("a", logging.INFO, __file__, 1, text, None, None)


def write(path: str, name: str, count: int) -> None:
    handler = SharedFile(path, max_bytes=20_000, backups=10)
    for number in range(count):
        handler.emit(record(f"{name} {number} {'x' * 40}"))
    handler.close()


def test_processes_that_write_and_rotate_together_lose_and_mix_nothing(tmp_path: Path) -> None:
    path, spawn = tmp_path / "logs" / "penstock.log", multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write, args=(str(path), f"w{n}", 600)) for n in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)

    files = sorted(path.parent.glob("penstock.log*"))
    lines = [line for file in files if file.suffix != ".lock" for line in file.read_text().splitlines()]
    expected = {f"w{n} {number} {'x' * 40}" for n in range(4) for number in range(600)}
    assert len(lines) == len(expected) and set(lines) == expected
    assert all(file.stat().st_size <= 20_000 + 4 * 60 for file in files)
    assert len(files) > 5


def test_the_oldest_file_goes_and_nobody_else_may_read_them(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "penstock.log"
    handler = SharedFile(str(path), max_bytes=100, backups=3)
    for number in range(50):
        handler.emit(record(f"{number:050}"))
    handler.close()

    files = sorted(file.name for file in path.parent.iterdir() if file.suffix != ".lock")
    assert files == ["penstock.log", "penstock.log.1", "penstock.log.2", "penstock.log.3"]
    assert path.read_text().splitlines()[-1] == f"{49:050}"
    assert all(file.stat().st_mode & 0o077 == 0 for file in (path.parent, *path.parent.iterdir()))


def test_a_file_that_cannot_be_written_breaks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    handler = SharedFile(str(tmp_path / "file" / "penstock.log"))

    handler.emit(record("lost here"))

    assert capsys.readouterr().err == ""


def line(number: int, **fields: str) -> bytes:
    at = datetime.fromtimestamp(1_767_225_600 + number, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    return orjson.dumps({"timestamp": at, "level": "info", "message": f"{number}", **fields}) + b"\n"


def test_lines_that_lie_across_blocks_and_files_are_whole(tmp_path: Path) -> None:
    count = 3 * log_files.BLOCK // 80
    lines = [line(number) for number in range(count)]
    (tmp_path / "penstock.log.1").write_bytes(b"".join(lines[: count // 2]))
    (tmp_path / "penstock.log").write_bytes(b"".join(lines[count // 2 :]))

    found = newest(tmp_path, Wanted(limit=count + 1))

    assert [each["message"] for each in found.lines] == [str(n) for n in reversed(range(count))]
    assert not found.truncated


def test_the_end_of_a_large_file_is_read_and_not_the_file(tmp_path: Path) -> None:
    with (tmp_path / "penstock.log").open("wb") as file:
        file.truncate(2_000_000_000)  # A hole, which would be as large in memory.
        file.seek(0, 2)
        file.write(b"\n" + line(1) + line(2))
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()

    found = newest(tmp_path, Wanted(limit=2))

    assert [each["message"] for each in found.lines] == ["2", "1"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000
    assert time.monotonic() - began < 2


def test_a_search_that_finds_nothing_ends_and_says_that_it_gave_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "MOST_READ", 100_000)
    (tmp_path / "penstock.log").write_bytes(b"".join(line(number) for number in range(5000)))

    found = newest(tmp_path, Wanted(limit=1, request_id="nobody"))

    assert (found.lines, found.truncated) == ([], True)


def test_one_endless_line_is_cut(tmp_path: Path) -> None:
    (tmp_path / "penstock.log").write_bytes(line(1) + b"x" * 3_000_000 + b"\n" + line(2))

    found = newest(tmp_path, Wanted(limit=10))

    assert [len(each["message"]) < 10_000 for each in found.lines] == [True, True, True]
    assert found.lines[2]["message"] == "1"
