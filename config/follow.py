"""Shows log files on the terminal as they grow: one readable line for each JSON line that the processes write."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

SHOWN_FIRST = ("timestamp", "level", "message", "event", "logger")
QUIET = ("celery.", "audit.tasks")
"""Loggers whose everyday lines stay in the file: a queue that is well, and the audit log's anchor of every minute."""
EVERYDAY = ("debug", "info")
CHUNK = 64 * 1024


class LogFile:
    """A log file that is rotated by renaming; reads from its present end onwards.

    name: what stands before each line on the terminal.
    wanted: words of which a plain line must hold one to be shown; empty shows all.
    """

    def __init__(self, path: Path, *, wanted: tuple[str, ...] = ()) -> None:
        self.path = path
        self.name = path.stem
        self._wanted = wanted
        self._file: BinaryIO | None = None
        self._rest = b""
        self._open(at_end=True)

    def lines(self) -> Iterator[str]:
        """What came since the last call, as readable lines; an unfinished line waits for its end."""
        for chunk in self._chunks():
            *whole, self._rest = (self._rest + chunk).split(b"\n")
            for line in whole:
                text = line.decode("utf-8", "replace").rstrip()
                if text and (not self._wanted or any(word in text for word in self._wanted)):
                    shown = readable(text)
                    if shown:
                        yield f"{self.name:<8} {shown}"

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _chunks(self) -> Iterator[bytes]:
        if self._file is None:
            self._open(at_end=False)
        while self._file is not None:
            while chunk := self._file.read(CHUNK):
                yield chunk
            if not self._rotated():
                return
            self.close()
            self._open(at_end=False)

    def _rotated(self) -> bool:
        """Whether the path names another file now, or the same file was cut."""
        assert self._file is not None
        try:
            now = self.path.stat()
        except FileNotFoundError:
            return False
        held = os.fstat(self._file.fileno())
        return (now.st_dev, now.st_ino) != (held.st_dev, held.st_ino) or now.st_size < self._file.tell()

    def _open(self, *, at_end: bool) -> None:
        try:
            self._file = self.path.open("rb")
        except FileNotFoundError:
            self._file = None
            return
        if at_end:
            self._file.seek(0, os.SEEK_END)


def readable(line: str) -> str:
    """A JSON log line as `time level message name=value ...`; any other line as it is, without control characters.

    Empty for what a person at the terminal does not need. Only errors may have more than one line (a traceback).
    """
    try:
        event = json.loads(line)
    except ValueError:
        return printable(line)
    if not isinstance(event, dict):
        return printable(line)
    level = str(event.get("level", ""))
    if level in EVERYDAY and str(event.get("logger", "")).startswith(QUIET):
        return ""
    message = str(event.get("message", event.get("event", ""))).strip()
    if level != "error":
        message = message.partition("\n")[0]
    time = str(event.get("timestamp", ""))[11:19]
    details = [f"{name}={value}" for name, value in event.items() if name not in SHOWN_FIRST]
    return printable(" ".join(word for word in (time, level, message, *details) if word))


def printable(text: str) -> str:
    """`text` without what would steer the terminal; line ends inside a value (a traceback) stay line ends."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)
