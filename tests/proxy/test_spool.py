"""The spool's writer and its files, without a database."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import segments
from proxy.spool import Final, Spool, SpoolUnavailable, _AttemptIds, new_attempt_id
from tests.support.records import a_start

pytestmark = pytest.mark.no_database

ROOT = Path(__file__).resolve().parents[2]
NEVER = 1e9


def a_final(key: str, **more: Any) -> Final:
    final: dict[str, Any] = {"id": key, "status": "success", "prompt_tokens": 5, "trace": None}
    return final | more  # type: ignore[return-value]


def contents(directory: Path) -> list[segments.Contents]:
    """What is in the segments, oldest first."""
    paths = [path for path in directory.iterdir() if segments.SEGMENT_NAME.fullmatch(path.name)]
    found = []
    for path in sorted(paths, key=lambda path: int(path.suffix[1:])):
        with path.open("rb") as file:
            found.append(segments.read(file))
    return found


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    """A spool whose clock is the test: it rotates at every tick that has something to say."""
    spool = Spool(tmp_path / "spool", segment_seconds=0)
    yield spool
    spool.close()


# -- the format


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(record=st.dictionaries(st.text(max_size=8), json_values, max_size=5))
def test_whatever_a_record_holds_becomes_one_line_that_reads_back(record: dict[str, Any]) -> None:
    line = segments.encode({**record, "id": "x", "t": "final"})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    back = segments.decode(line)
    assert back is not None
    assert back["id"] == "x"


@given(texts=st.lists(st.text(max_size=20), min_size=1, max_size=5), data=st.data())
def test_f26_a_segment_cut_anywhere_reads_as_the_lines_that_were_whole(
    texts: list[str], data: st.DataObject
) -> None:
    lines = [
        segments.encode({"t": "final", "id": str(n), "error_code": text}) for n, text in enumerate(texts)
    ]
    whole = b"".join(lines)
    cut = data.draw(st.integers(0, len(whole)))
    zeros = data.draw(st.sampled_from([b"", bytes(100)]))
    expected = [str(n) for n in range(len(lines)) if sum(map(len, lines[: n + 1])) <= cut]
    read = segments.read((whole[:cut] + zeros).splitlines(keepends=True))
    assert list(read.finals) == expected
    assert read.corrupt == 0


@given(data=st.data())
def test_f26_a_changed_byte_costs_the_records_it_touches_and_no_others(data: st.DataObject) -> None:
    lines = [segments.encode({"t": "final", "id": str(n), "model": "m" * n}) for n in range(5)]
    whole = bytearray(b"".join(lines))
    place = data.draw(st.integers(0, len(whole) - 1))
    whole[place] ^= data.draw(st.integers(1, 255))
    hit = next(n for n in range(5) if place < sum(map(len, lines[: n + 1])))
    read = segments.read(part + b"\n" for part in bytes(whole).split(b"\n"))
    lost = {str(n) for n in range(5)} - set(read.finals)
    assert str(hit) in lost
    assert lost <= {str(hit), str(hit + 1)}  # a newline that is gone joins two lines
    assert all(final["model"] == "m" * int(key) for key, final in read.finals.items())


def test_corrupt_lines_in_the_middle_are_counted_and_skipped() -> None:
    good = segments.encode({"t": "final", "id": "a"})
    read = segments.read([good, b"00000000 {}\n", b"\n", segments.encode({"t": "final", "id": "b"})])
    assert list(read.finals) == ["a", "b"]
    assert read.corrupt == 2


def test_a_caller_cannot_make_a_record_huge() -> None:
    line = segments.encode({"id": "x", "requested_model": "m" * 10_000_000, "trace": ["t" * 10_000_000]})
    assert len(line) < 2048
    assert segments.decode(line) == {"id": "x", "requested_model": "m" * segments.MAX_TEXT, "trace": None}


# -- identifiers


def test_attempt_ids_are_uuids_of_version_7_that_only_grow() -> None:
    new = _AttemptIds().new  # The process's own may be ahead: another test has moved the clock.
    before = time.time_ns() // 1_000_000
    ids = [new() for _ in range(20_000)]
    after = time.time_ns() // 1_000_000
    assert ids == sorted(set(ids))
    parsed = [uuid.UUID(text) for text in ids]
    assert {(one.version, one.variant) for one in parsed} == {(7, uuid.RFC_4122)}
    assert all(before <= one.int >> 80 <= after + 1 for one in parsed)


def test_f35_attempt_ids_grow_when_the_clock_is_set_back(monkeypatch: pytest.MonkeyPatch) -> None:
    first = new_attempt_id()
    an_hour_ago = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr(time, "time_ns", lambda: an_hour_ago)
    assert first < new_attempt_id() < new_attempt_id()


def test_attempt_ids_of_several_threads_never_meet() -> None:
    found: list[str] = []
    threads = [
        threading.Thread(target=lambda: found.extend(new_attempt_id() for _ in range(2_000)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8_000


# -- the writer


def test_a_final_record_carries_the_fields_of_its_start(spool: Spool) -> None:
    spool.start(a_start("a"))
    spool.finish(a_final("a", status="error", error_code="upstream_timeout"))
    (read,) = contents(spool.directory)
    assert read.finals["a"] == {
        **a_start("a"),
        **a_final("a", status="error", error_code="upstream_timeout"),
        "t": "final",
    }
    assert read.open_starts == {}


def test_records_are_in_the_file_when_the_call_returns(spool: Spool) -> None:
    spool.start(a_start("a"))
    assert list(contents(spool.directory)[0].open_starts) == ["a"]


def test_open_starts_move_to_the_next_segment(spool: Spool) -> None:
    spool.start(a_start("long"))
    spool.start(a_start("short"))
    spool.finish(a_final("short"))
    spool.tick()
    spool.finish(a_final("long"))
    first, second = contents(spool.directory)
    assert list(first.finals) == ["short"]
    assert list(second.finals) == ["long"]
    assert second.finals["long"]["gateway_key"] == "shop"


def test_an_idle_spool_does_not_rotate(spool: Spool) -> None:
    spool.start(a_start("a"))
    for _ in range(5):
        spool.tick()
    assert len(contents(spool.directory)) == 1


def test_a_segment_is_closed_when_it_is_large(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_seconds=NEVER, segment_bytes=1_000)
    for number in range(6):
        spool.start(a_start(str(number)))
        spool.finish(a_final(str(number)))
        spool.tick()
    spool.close()
    assert len(contents(tmp_path)) >= 3


def test_a_worker_holds_its_segment_and_lets_go_of_the_one_it_closed(spool: Spool) -> None:
    spool.start(a_start("a"))
    spool.finish(a_final("a"))
    spool.tick()
    held = [_is_locked(spool.directory / f"{spool.worker}.{number}") for number in (1, 2)]
    assert held == [False, True]
    spool.close()
    assert not _is_locked(spool.directory / f"{spool.worker}.2")


def test_a_closed_segment_gives_back_the_space_it_did_not_use(spool: Spool) -> None:
    spool.start(a_start("a"))
    spool.finish(a_final("a"))
    path = spool.directory / f"{spool.worker}.1"
    assert path.stat().st_size > segments.AHEAD_BYTES
    spool.tick()
    assert path.read_bytes().endswith(b"}\n")


def test_the_spool_is_readable_by_its_owner_only(spool: Spool) -> None:
    spool.start(a_start("a"))
    assert spool.directory.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in spool.directory.iterdir())


def test_finishing_what_was_never_started_is_recorded_and_does_not_raise(spool: Spool) -> None:
    spool.start(a_start("a"))
    spool.finish(a_final("b"))
    assert list(contents(spool.directory)[0].finals) == ["b"]


def test_a_closed_spool_refuses(spool: Spool) -> None:
    spool.run()
    spool.close()
    assert spool.problem
    with pytest.raises(SpoolUnavailable):
        spool.start(a_start("a"))


def test_f26_a_folder_over_its_cap_refuses_starts_but_takes_finals(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=1000, segment_seconds=0)
    spool.start(a_start("a"))
    spool.tick()
    with pytest.raises(SpoolUnavailable, match="full"):
        spool.start(a_start("b"))
    spool.finish(a_final("a"))
    spool.close()
    assert list(contents(tmp_path)[-1].finals) == ["a"]


def test_f26_a_folder_that_cannot_be_made_is_reported_and_refuses(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    spool = Spool(tmp_path / "file" / "spool")
    spool.run()
    with pytest.raises(SpoolUnavailable):
        spool.start(a_start("a"))
    assert spool.problem
    spool.close()


def test_the_thread_rotates_while_the_event_loop_writes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, segment_seconds=0, tick_seconds=0.001)
    spool.run()
    expected: list[str] = []
    deadline = time.monotonic() + 20
    while len(expected) < 5_000 or len(list(tmp_path.iterdir())) < 4:
        assert time.monotonic() < deadline, "the thread does not rotate"
        expected.append(new_attempt_id())
        spool.start(a_start(expected[-1]))
        spool.finish(a_final(expected[-1]))
    spool.close()
    read = contents(tmp_path)
    assert len(read) > 2
    assert set().union(*(one.finals for one in read)) == set(expected)
    assert all(not one.open_starts for one in read[-1:])
    assert sum(one.corrupt for one in read) == 0


steps = st.lists(st.sampled_from(["start", "finish oldest", "finish newest", "tick"]), max_size=40)


@settings(deadline=None, max_examples=60)
@given(steps=steps)
def test_after_any_history_each_segment_stands_alone(steps: list[str]) -> None:
    """Model: what is open, and what ended, is what a reader of the segments finds; nothing ends twice or never."""
    with tempfile.TemporaryDirectory() as folder:
        spool = Spool(Path(folder), segment_seconds=0)
        alive: list[str] = []
        ended: list[str] = []
        for number, step in enumerate(steps):
            if step == "start":
                spool.start(a_start(str(number)))
                alive.append(str(number))
            elif step == "tick":
                spool.tick()
            elif alive:
                ended.append(alive.pop(0 if step == "finish oldest" else -1))
                spool.finish(a_final(ended[-1]))
        read = contents(Path(folder))
        spool.close()
        assert sorted(key for one in read for key in one.finals) == sorted(ended)
        assert sorted(read[-1].open_starts if read else []) == sorted(alive)
        assert all(final["gateway_key"] == "shop" for one in read for final in one.finals.values())


# -- a full disk

FULL_DISK = """
    import json, sys
    from pathlib import Path
    from proxy.spool import Spool, SpoolUnavailable, new_attempt_id

    spool = Spool(Path(sys.argv[1]), segment_seconds=0)
    began, refused = [], False
    for _ in range(100_000):
        key = new_attempt_id()
        try:
            spool.start({"id": key, "model": "m" * (len(began) % 200), "requested_model": "ü" * 50})
        except SpoolUnavailable:
            refused = True
            break
        began.append(key)
    first, rest = began[: len(began) // 2], began[len(began) // 2 :]
    for key in first:
        spool.finish({"id": key, "status": "success", "duration_ms": 10, "trace": ["t" * 5000] * 3})
    after_first = spool.problem
    spool.tick()  # it may be too full to rotate; it must not lose anything by trying
    for key in rest:
        spool.finish({"id": key, "status": "success", "prompt_tokens": 2**60, "error_code": "e" * 60})
    after_rest = spool.problem
    spool.close()
    print(json.dumps({"began": began, "refused": refused, "problems": [after_first, after_rest]}))
"""


def fill(directory: Path, prelude: str = "") -> dict[str, Any]:
    script = textwrap.dedent(prelude) + textwrap.dedent(FULL_DISK)
    done = subprocess.run(
        [sys.executable, "-c", script, str(directory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def assert_nothing_was_lost(answer: dict[str, Any], directory: Path) -> None:
    assert answer["refused"]
    assert "final records wait in memory" not in answer["problems"]
    read = contents(directory)
    finals = {key: final for one in read for key, final in one.finals.items()}
    assert len(answer["began"]) > 10
    assert sorted(finals) == sorted(answer["began"])
    assert {final["status"] for final in finals.values()} == {"success"}


def test_f26_a_file_that_may_not_grow_still_takes_every_final_record(tmp_path: Path) -> None:
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))"
    assert_nothing_was_lost(fill(tmp_path / "spool", limit), tmp_path / "spool")


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """Half a megabyte of tmpfs; outside pytest's folders, so that a mount left by a killed run is in nobody's way."""
    mountpoint = Path(tempfile.mkdtemp(prefix="small-disk-"))
    command = ["mount", "-t", "tmpfs", "-o", "size=512k", "none", str(mountpoint)]
    try:
        mounted = (
            os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
        )
    except OSError:
        mounted = False
    if not mounted:
        mountpoint.rmdir()
        pytest.skip("mounting a small tmpfs is not allowed here")
    yield mountpoint
    subprocess.run(["umount", "--lazy", str(mountpoint)], check=True)
    mountpoint.rmdir()


def test_f26_a_full_disk_refuses_starts_and_still_takes_every_final_record(small_disk: Path) -> None:
    assert_nothing_was_lost(fill(small_disk / "spool"), small_disk / "spool")


def test_f26_a_full_disk_is_used_again_when_there_is_room(small_disk: Path) -> None:
    ballast = small_disk / "ballast"
    spool = Spool(small_disk / "spool", segment_seconds=0)
    spool.start(a_start("a"))
    with ballast.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        _for_ever(lambda: file.write(bytes(4096)))
    with pytest.raises(SpoolUnavailable):
        _for_ever(lambda: spool.start(a_start(new_attempt_id())))
    spool.finish(a_final("a"))
    spool.tick()
    full = spool.problem
    ballast.unlink()
    spool.tick()
    assert full
    spool.start(a_start("b"))
    spool.finish(a_final("b"))
    assert spool.problem is None
    spool.close()
    assert {"a", "b"} <= set().union(*(one.finals for one in contents(small_disk / "spool")))


def _for_ever(act: Callable[[], object]) -> None:
    for _ in range(1_000_000):
        act()


def _is_locked(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
