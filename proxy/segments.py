"""The files of the spool: how a record becomes a line, a line a record, and how a segment is kept under its flock.

A line is `<crc32 of the JSON, 8 hex digits> <JSON>\\n`; a line that does not match its checksum never happened. There are
two kinds of records: `start`, written before an upstream is dialled, and `final`, written before the terminal bytes are
forwarded. A final carries the fields of its start, and the starts that are still open when a segment is closed are copied
to the next one, so each segment stands alone.

What a reader may conclude (`proxy.usage` does): a segment whose flock is free is complete. If `<worker uid>.<n + 1>`
exists, the worker closed it and its open starts live on there; if not, the worker is dead and they never end. The next
segment therefore gets its final name only after the copies are in it, and before the old one's flock is let go.

This module knows no Django and no settings.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import orjson

SEGMENT_NAME = re.compile(r"([0-9a-f]{32})\.([0-9]{1,18})")
UNFINISHED = ".new"
"""Suffix of a segment that is still being made; without its worker's flock it is rubbish."""

AHEAD_BYTES = 512 * 1024
MAX_LINE_BYTES = 64 * 1024
MAX_TEXT = 512


class Start(TypedDict):
    """What is known before dialling. created_at is Unix time in milliseconds; ids are those of rows, or None."""

    id: str
    request_id: str
    attempt: int
    created_at: int
    gateway_key_id: int | None
    gateway_key: str
    owner: str
    route: str
    provider_id: int | None
    provider: str
    api_key_id: int | None
    requested_model: str
    model: str
    purpose: str
    stream: bool


class Final(TypedDict, total=False):
    """How an attempt ended; only `id` and `status` must be there. Times are milliseconds, tokens and bytes are counts."""

    id: str
    status: str
    error_code: str
    http_status: int | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    cache_write_tokens: int
    reasoning_tokens: int
    tokens_source: str
    cost_nanodollars: int | None
    price_id: int | None
    ttft_ms: int | None
    duration_ms: int | None
    bytes_out: int
    client_disconnected: bool
    trace: Any


def encode(record: dict[str, Any], *, behind: bytes = b"") -> bytes:
    """One line of the spool. Never fails: what JSON cannot hold is replaced, what is far too long is cut.

    behind: an earlier line that this one repeats, with `record` added: of a name that stands twice the last one counts.
    """
    try:
        body = orjson.dumps(record)
    except TypeError:  # lone surrogates, integers beyond 64 bits, foreign types
        body = orjson.dumps(_plain(record))
    if len(body) > MAX_LINE_BYTES:
        body = orjson.dumps(_plain({**record, "trace": None}))
    if behind:
        body = behind[9:-2] + b"," + body[1:]
    return b"%08x %b\n" % (zlib.crc32(body), body)


def decode(line: bytes) -> dict[str, Any] | None:
    """The record of one line, with or without its newline; None when it is torn or corrupt."""
    head, body = line[:9], line[9:].removesuffix(b"\n")
    if head != b"%08x " % zlib.crc32(body):
        return None
    try:
        record = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("id"), str) else None


def _plain(value: Any, depth: int = 0) -> Any:
    """`value` as something every JSON reader and database holds: bounded text, at most 32 levels, and integers
    of 64 bits (a larger one becomes a float just as absurd, so that a reader still sees that it was)."""
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return value if -(2**63) <= value < 2**63 else float("1e300" if value > 0 else "-1e300")
    if isinstance(value, dict) and depth < 32:
        return {_plain(str(key)): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple) and depth < 32:
        return [_plain(item, depth + 1) for item in value]
    text = value if isinstance(value, str) else type(value).__name__
    return text[:MAX_TEXT].encode("utf-8", "replace").decode()


class Contents(NamedTuple):
    """A segment as read: finals and starts without a final by id, and how many whole lines were corrupt."""

    finals: dict[str, dict[str, Any]]
    open_starts: dict[str, dict[str, Any]]
    corrupt: int


def read(lines: Iterable[bytes]) -> Contents:
    """Read a segment's lines (as iterating a binary file gives them). The first final of an id counts.

    A last line without its newline is torn, or space that was reserved and never used; neither is an error.
    """
    finals: dict[str, dict[str, Any]] = {}
    starts: dict[str, dict[str, Any]] = {}
    corrupt = 0
    for line in lines:
        record = decode(line) if line.endswith(b"\n") else None
        if record is None:
            corrupt += line.endswith(b"\n")
        elif record.get("t") == "final":
            finals.setdefault(record["id"], record)
        else:
            starts[record["id"]] = record
    return Contents(finals, {key: start for key, start in starts.items() if key not in finals}, corrupt)


class Segment:
    """One file under its flock. `size` is where the next line goes; disk space is ours up to `room`.

    Space is reserved by extending the file, and lines are written at an offset instead of appended: that way the kernel
    has already given us the blocks when the disk fills up, on every file system where preallocation means anything.
    (FALLOC_FL_KEEP_SIZE would keep the size honest, but Python does not offer it, and the C library's emulation for
    file systems without fallocate only exists for the extending form.) Readers take the zeros at the end for a torn line.
    """

    __slots__ = ("born", "copied", "fd", "finals", "path", "room", "size", "synced")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = self.room = self.synced = self.copied = self.finals = 0
        self.born = time.monotonic()
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.discard()
            raise

    def reserve(self, end: int) -> None:
        """Make sure that bytes up to `end` can be written on a full disk; OSError when they cannot."""
        if end <= self.room:
            return
        try:
            _allocate(self.fd, self.room, end + AHEAD_BYTES)
            self.room = end + AHEAD_BYTES
        except OSError:
            _allocate(self.fd, self.room, end)
            self.room = end

    def append(self, data: bytes | bytearray) -> None:
        written = os.pwrite(self.fd, data, self.size)
        if written != len(data):  # what was written of it is overwritten by the next line
            raise OSError(errno.ENOSPC, "the record was written in part")
        self.size += written
        self.room = max(self.room, self.size)

    def publish(self, path: Path) -> None:
        self.path.rename(path)
        self.path = path

    def sync(self) -> None:
        size = self.size
        if size != self.synced:
            os.fsync(self.fd)
            self.synced = size

    def close(self) -> None:
        """Give back the unused space and let the flock go; a reader may take the file from here on."""
        try:
            os.ftruncate(self.fd, self.size)
            self.sync()
        finally:
            os.close(self.fd)

    def discard(self) -> None:
        os.close(self.fd)
        self.path.unlink(missing_ok=True)


def _allocate(fd: int, start: int, end: int) -> None:
    try:
        os.posix_fallocate(fd, start, end - start)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
            raise
        if os.pwrite(fd, bytes(end - start), start) != end - start:
            raise OSError(errno.ENOSPC, "the space was given in part") from error
