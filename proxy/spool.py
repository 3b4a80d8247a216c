"""The spool: what every attempt is worth, on disk before the caller has the last byte of its answer.

`Spool` is the writer of one worker (the files and what a reader may conclude from them: `proxy.segments`). The start of
an attempt is written before an upstream is dialled, its final record before the terminal bytes are forwarded; both with
one write by the event loop. A thread moves on to a new segment, syncs to the disk and watches the size of the folder.

This module knows no Django and no settings.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from proxy.segments import UNFINISHED, Final, Segment, Start, Text, encode

__all__ = ["Final", "Spool", "SpoolUnavailable", "Start", "Text", "new_attempt_id"]

logger = logging.getLogger(__name__)

MAX_FOLDER_BYTES = 1024**3
SEGMENT_BYTES = 8 * 1024**2
SEGMENT_SECONDS = 5.0
TICK_SECONDS = 1.0
FINAL_BYTES = 1024
"""What a final record may need beyond the bytes of its start, without its trace."""
ROOM_BYTES = 16 * 1024
"""With less space than this the spool is about to refuse, and says so."""


class SpoolUnavailable(Exception):
    """No usage can be promised to be kept, so nothing may be dialled (503 `usage_log_unavailable`)."""


# -- identifiers -----------------------------------------------------------------------------------------------------


class _AttemptIds:
    """UUIDv7 (RFC 9562, section 5.7), each larger than all that this process made before.

    Within one millisecond, and while the clock stands before an earlier reading, the 74 random bits grow by a random
    step (section 6.2, method 2). The first of a millisecond leaves half the range to grow in. An id opens nothing, so the
    random numbers need not be secret: asking the kernel three times for each request would cost 2 % of it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0
        self._tail = 0

    def new(self) -> str:
        """32 hex digits."""
        with self._lock:
            now = time.time_ns() // 1_000_000
            self._tail += 1 + random.getrandbits(32)
            if now > self._last or self._tail >> 74:
                self._last = max(now, self._last + 1)
                self._tail = random.getrandbits(73)
            stamp, tail = self._last, self._tail
        return f"{stamp:012x}7{tail >> 62:03x}{0b10 << 62 | tail & (1 << 62) - 1:016x}"


new_attempt_id = _AttemptIds().new


# -- the writer ------------------------------------------------------------------------------------------------------


class Spool:
    """The writer of one worker. `start` and `finish` belong to the event loop, `tick` to the thread of `run`.

    The lock is held for a write or a rename, never for an fsync. Nothing touches the disk before `run` or the first start.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_bytes: int = MAX_FOLDER_BYTES,
        segment_seconds: float = SEGMENT_SECONDS,
        segment_bytes: int = SEGMENT_BYTES,
        tick_seconds: float = TICK_SECONDS,
    ) -> None:
        self.directory = directory
        self.worker = uuid.uuid4().hex
        self._max_bytes = max_bytes
        self._segment_seconds = segment_seconds
        self._segment_bytes = segment_bytes
        self._tick_seconds = tick_seconds
        self._lock = threading.Lock()
        self._segment: Segment | None = None
        self._number = 0
        self._open: dict[str, bytes] = {}
        self._promised = 0
        self._pending: dict[str, bytes] = {}
        self._echo: bytearray | None = None
        self._measured = float("-inf")
        self._refusals: dict[str, str] = {}
        self._problems: dict[str, str] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def problem(self) -> str | None:
        """Why starts are refused right now, in a few words; None while all is well."""
        if self._pending:
            return "final records wait in memory"
        return next(iter(self._refusals.copy().values()), self._problems.get("make room"))

    # -- the event loop's side

    def start(self, record: Start) -> None:
        """Promise that this attempt leaves a record, whatever happens next. SpoolUnavailable when nobody can."""
        line = encode({"t": "start", **record})
        with self._lock:
            if self._refusals or self._pending:
                raise SpoolUnavailable(self.problem)
            promised = self._promised + len(line) + FINAL_BYTES
            try:
                segment = self._segment or self._first_segment()
                segment.reserve(segment.size + len(line) + promised)
                segment.append(line)
            except OSError as error:
                raise SpoolUnavailable(os.strerror(error.errno or errno.EIO)) from error
            self._promised = promised
            self._open[record["id"]] = line
            if self._echo is not None:
                self._echo += line

    def finish(self, record: Final) -> None:
        """Keep how an attempt ended, merged with its start. Never raises: what the disk refuses is tried again by `tick`."""
        key = record["id"]
        start = self._open.get(key, b"")
        line = encode({**record, "t": "final"}, behind=start)
        with self._lock:
            try:
                if start and len(line) > len(start) + FINAL_BYTES and not self._has_room(key, line):
                    line = encode({**record, "t": "final", "trace": None}, behind=start)
                self._write_final(key, line)
            except OSError as error:
                self._pending[key] = line
                self._note("final", error)

    def keep(self, record: Text) -> None:
        """Keep a text beside the final that was written before. Never raises: what the disk refuses is lost, records go first."""
        line = encode({**record, "t": "text"})
        with self._lock:
            segment = self._segment
            if segment is None or self._refusals or self._pending:
                return
            try:
                segment.reserve(segment.size + len(line) + self._promised)
                segment.append(line)
            except OSError as error:
                self._note("text", error)
                return
            segment.finals += 1  # Like a final it is something to say, so that the segment is not held back.
            if self._echo is not None:
                self._echo += line

    def _has_room(self, key: str, line: bytes) -> bool:
        """Whether a final that is longer than promised (its trace) can have what it needs without taking it from others."""
        try:
            if self._segment is not None:
                self._segment.reserve(self._segment.size + len(line) + self._promised - self._promise(key))
        except OSError:
            return False
        return True

    def _promise(self, key: str) -> int:
        start = self._open.get(key)
        return len(start) + FINAL_BYTES if start else 0

    def _write_final(self, key: str, line: bytes) -> None:
        """Append a final; its start stays open until this has worked, so that it is copied on if it has not."""
        segment = self._segment
        if segment is None:
            raise OSError(errno.EBADF, "there is no segment to write to")
        segment.append(line)
        segment.finals += 1
        self._promised -= self._promise(key)
        self._open.pop(key, None)
        if self._echo is not None:
            self._echo += line

    # -- the thread's side

    def run(self) -> None:
        """Open the first segment and start the thread. A disk that refuses is reported by `problem`, not raised."""
        self._guard("make room", self._make_room)
        self._guard("measure", self._measure)
        self._thread = threading.Thread(target=self._loop, name="spool", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and let go of the segment. Attempts that are still open become `interrupted`."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)  # a disk that hangs must not hold up the shutdown
        self._guard("final", self._write_pending)
        with self._lock:
            self._refusals["closed"] = "the spool is closed"
            segment, self._segment = self._segment, None
        if segment is not None:
            self._guard("close", segment.close)

    def tick(self) -> None:
        """Once a second: write what could not be written, rotate when due, fsync, measure the folder. Never raises."""
        self._guard("final", self._write_pending)
        if self._due():
            self._guard("rotate", self._rotate)
            self._guard("final", self._write_pending)
        self._guard("make room", self._make_room)
        self._guard("sync", self._sync)
        self._guard("measure", self._measure)

    def _loop(self) -> None:
        while not self._stop.wait(self._tick_seconds):
            try:
                self.tick()
            except Exception:
                # The thread must outlive a mistake in it: without it nothing is rotated or synced.
                logger.exception("spool tick failed")

    def _guard(self, what: str, step: Callable[[], None]) -> None:
        try:
            step()
        except OSError as error:
            self._note(what, error)
        else:
            if self._problems.pop(what, None):
                logger.info("spool works again: %s", what)

    def _note(self, what: str, error: OSError) -> None:
        """Log a failure when it begins, not at every tick that it lasts."""
        reason = os.strerror(error.errno or errno.EIO)
        if self._problems.get(what) != reason:
            self._problems[what] = reason
            logger.error("spool cannot %s: %s", what, reason)

    def _write_pending(self) -> None:
        with self._lock:
            for key, line in list(self._pending.items()):
                self._write_final(key, line)
                del self._pending[key]

    def _due(self) -> bool:
        segment = self._segment
        if segment is None:
            return False
        if self._pending or "sync" in self._problems:
            return True  # the file itself may be at fault; another one may not be
        # A segment without finals has nothing to say to a reader that its successor would not repeat.
        old = time.monotonic() - segment.born >= self._segment_seconds
        return segment.finals > 0 and (old or segment.size - segment.copied >= self._segment_bytes)

    def _make_room(self) -> None:
        """Reserve space here, so that the event loop seldom has to; that it fails is how `problem` knows of a full disk."""
        with self._lock:
            if "closed" not in self._refusals:
                segment = self._segment or self._first_segment()
                segment.reserve(segment.size + self._promised + ROOM_BYTES)

    def _first_segment(self) -> Segment:
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        fresh = self._new_segment()
        try:
            fresh.publish(self._path(self._number + 1))
        except OSError:
            fresh.discard()
            raise
        self._number += 1
        self._segment = fresh
        return fresh

    def _path(self, number: int) -> Path:
        return self.directory / f"{self.worker}.{number}"

    def _new_segment(self) -> Segment:
        path = self._path(self._number + 1)
        return Segment(path.with_name(path.name + UNFINISHED))

    def _rotate(self) -> None:
        """Move to the next segment. The copies are on the disk before it has its name, and the event loop never waits for
        that: what it writes meanwhile goes to the old segment and to `_echo`, which follows under the lock.
        """
        with self._lock:
            copies = b"".join(self._open.values())
            promised = self._promised
            self._echo = bytearray()
        fresh = None
        try:
            fresh = self._new_segment()
            fresh.reserve(len(copies) + promised)
            fresh.append(copies)
            fresh.sync()
            with self._lock:
                old = self._switch(fresh)
        except OSError:
            if fresh is not None:
                fresh.discard()
            raise
        finally:
            with self._lock:
                self._echo = None
        self._settle(fresh, old)

    def _switch(self, fresh: Segment) -> Segment | None:
        fresh.copied = fresh.size
        echo = self._echo or b""
        fresh.reserve(fresh.size + len(echo) + self._promised)
        fresh.append(echo)
        fresh.publish(self._path(self._number + 1))
        self._number += 1
        self._echo = None
        old, self._segment = self._segment, fresh
        return old

    def _settle(self, fresh: Segment, old: Segment | None) -> None:
        """Make the new name durable, then let the old segment go; a failure here costs durability, not records."""
        try:
            fresh.sync()
            self._sync_folder()
        finally:
            if old is not None:
                old.close()

    def _sync(self) -> None:
        try:
            if self._segment is not None:
                self._segment.sync()
        except OSError:
            self._refusals["sync"] = "the spool cannot be written to disk"
            raise
        self._refusals.pop("sync", None)

    def _sync_folder(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _measure(self) -> None:
        """Refuse starts while the folder is over its cap: then nobody drains it, and the disk is not ours to fill."""
        if time.monotonic() - self._measured < self._segment_seconds:
            return
        self._measured = time.monotonic()
        if _folder_bytes(self.directory) > self._max_bytes:
            self._refusals["folder"] = "the spool is full and nobody drains it"
        else:
            self._refusals.pop("folder", None)


def _folder_bytes(directory: Path) -> int:
    total = 0
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # drained meanwhile
                total += entry.stat().st_size
    return total
