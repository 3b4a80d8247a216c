"""The backup on disk: one current file, its former versions, and one for each day.

    BACKUP_FILE                            the configuration as it is, at most a minute old
    <name>.20261125T223000Z.json           what it was before it changed, the last BACKUP_KEEP of them
    <name>.20261125.json                   the first of each day, the last BACKUP_KEEP of them

A file appears whole or not at all, and only its owner may read it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from django.conf import settings
from django.utils import timezone

from audit.models import Entry, Head
from providers import transfer
from proxy.configuration import document

MODE, FOLDER_MODE = 0o600, 0o700
QUIET = timedelta(seconds=3)
"""After a change, others are waited for this long, so that a row of edits makes one backup,"""
LATEST = timedelta(seconds=60)
"""but not longer than this."""

_HEAD = re.compile(r'"seq": (\d+),\s*"hash": "([0-9a-f]{64})"')
_HEAD_BYTES = 1024


class NotWritten(Exception):
    """The disk did not take the backup. The message says why."""


@dataclass(frozen=True, slots=True)
class Backup:
    """A backup that was written. version: the number of the audit entry up to which it has everything."""

    path: Path
    at: datetime
    version: int
    bytes: int
    sha256: str


def write() -> Backup:
    """Write the configuration as it is now. What the file held before is kept beside it, if it was something else.

    Raises NotWritten, DatabaseError.
    """
    path = Path(settings.BACKUP_FILE)
    try:
        with _alone(path):
            made = document.build(sealed=True)
            text = document.as_json(made).encode()
            _keep_former(path, made)
            _replace(path, text)
            _keep_day(path, made)
            _forget_old(path)
    except OSError as error:
        raise NotWritten(f"{path} cannot be written: {error.strerror or type(error).__name__}") from error
    return Backup(
        path,
        datetime.fromisoformat(made["made"]["at"]),
        made["made"]["head"]["seq"],
        len(text),
        hashlib.sha256(text).hexdigest(),
    )


def is_due(now: datetime) -> bool:
    """Whether something changed since the backup that is there, and no more changes are to be waited for."""
    path = Path(settings.BACKUP_FILE)
    head = Head.objects.filter(pk=1).values_list("seq", "hash").first()
    if head is None:
        return False
    stored = head_of(path)
    if stored == head and (not settings.BACKUP_KEEP or _day_file(path, now).exists()):
        return False
    if stored is None or stored == head:
        return True
    newest = Entry.objects.order_by("-seq").values_list("timestamp", flat=True).first()
    oldest = (
        Entry.objects.filter(seq__gt=stored[0]).order_by("seq").values_list("timestamp", flat=True).first()
    )
    settled = newest is None or not now - QUIET < newest <= now
    return settled or oldest is None or now - oldest > LATEST


def head_of(path: Path) -> tuple[int, str] | None:
    """Up to which audit entry a backup has everything; None where there is no backup that says so."""
    try:
        with path.open("rb") as file:
            start = file.read(_HEAD_BYTES).decode(errors="replace")
    except OSError:
        return None
    found = _HEAD.search(start)
    return (int(found[1]), found[2]) if found else None


def former() -> int:
    """How many former versions and days are kept on this machine."""
    path = Path(settings.BACKUP_FILE)
    return len(_former(path, r"\d{8}(?:T\d{6}Z)?"))


def problems() -> list[str]:
    """What is wrong with the backups on this machine, in sentences; nothing where no worker has ever made one."""
    path = Path(settings.BACKUP_FILE)
    if not path.parent.is_dir():
        return []
    try:
        mode, described = path.stat().st_mode & 0o777, json.loads(path.read_bytes())["keyring"]
    except FileNotFoundError:
        return ["is gone; the worker makes it anew"]
    except (OSError, ValueError, LookupError, TypeError):
        return ["cannot be read, or is no backup of this version"]
    found = []
    if mode & 0o077:
        found.append(f"may be read by others (mode {mode:o}); chmod 600 it")
    if not transfer.opens_here(described):
        found.append("was made under another PENSTOCK_ENCRYPTION_KEY, so its secrets do not open here")
    if (late := _late(head_of(path), timezone.now())) > 2 * LATEST:
        found.append(
            f"lacks the changes of the last {late.total_seconds() / 60:.0f} minutes; is the worker running?"
        )
    return found


def _late(head: tuple[int, str] | None, now: datetime) -> timedelta:
    """For how long a change has been waiting for its backup."""
    entries = Entry.objects.filter(seq__gt=head[0] if head else 0).order_by("seq")
    oldest = entries.values_list("timestamp", flat=True).first()
    return now - oldest if oldest else timedelta()


# -- on disk -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """One writer at a time on this machine; the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=FOLDER_MODE)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: bytes) -> None:
    """Write a file beside it, make sure that it is on the disk, and put it in the place of the old one."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}.{time.monotonic_ns()}")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _keep_former(path: Path, made: dict[str, Any]) -> None:
    """A second name for what is about to be replaced, if it says something else."""
    try:
        former = json.loads(path.read_bytes())
        content, at = document.content_of(former), datetime.fromisoformat(former["made"]["at"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        # No backup of ours, but somebody's file: it is kept all the same.
        content, at = {}, timezone.now()
    if content != document.content_of(made):
        name = f"{path.stem}.{at.astimezone(UTC):%Y%m%dT%H%M%SZ}{path.suffix}"
        _second_name(path, path.with_name(name))


def _second_name(path: Path, name: Path) -> None:
    """Keep what `path` holds under `name` as well, unless that is taken. Not every disk can give a file two names."""
    try:
        name.hardlink_to(path)
    except FileExistsError:
        pass
    except OSError:
        shutil.copy2(path, name)


def _day_file(path: Path, moment: datetime) -> Path:
    return path.with_name(f"{path.stem}.{moment.astimezone(UTC):%Y%m%d}{path.suffix}")


def _keep_day(path: Path, made: dict[str, Any]) -> None:
    if settings.BACKUP_KEEP:
        _second_name(path, _day_file(path, datetime.fromisoformat(made["made"]["at"])))


def _forget_old(path: Path) -> None:
    """Keep the newest BACKUP_KEEP former versions, and as many days; also sweep up what a killed writer left."""
    for digits in (r"\d{8}T\d{6}Z", r"\d{8}"):
        kept = _former(path, digits)
        for old in kept[: max(0, len(kept) - settings.BACKUP_KEEP)]:
            old.unlink(missing_ok=True)
    for torn in path.parent.glob(f".{path.name}.[0-9]*"):
        torn.unlink(missing_ok=True)


def _former(path: Path, digits: str) -> list[Path]:
    """The files beside `path` with a date of this form in their name, the oldest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}\.{digits}{re.escape(path.suffix)}")
    there = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(each for each in there if pattern.fullmatch(each.name))
