"""Whether the log of changes is whole: no entry edited, removed, put in or moved, and none cut off at its end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from django.conf import settings
from django.db import connection
from django.utils import timezone

from audit.chain import GENESIS, link
from audit.models import Entry, Head

MAX_PROBLEMS = 100
ANCHOR_MODE = 0o600


@dataclass(frozen=True, slots=True)
class Report:
    """What `verify` found: how many entries there are, the head, and what is wrong (one sentence each)."""

    entries: int
    seq: int
    hash: str
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify(anchor_file: Path | None = None) -> Report:
    """Walk the whole chain, compare its end with the head, and both with the anchors that were written outside.

    anchor_file: default AUDIT_ANCHOR_FILE; a missing file is no problem, a line of it that disagrees is.
    """
    anchors = read_anchors(anchor_file or settings.AUDIT_ANCHOR_FILE)
    # The head first: entries that are written meanwhile come after it.
    head = Head.objects.filter(pk=1).first() or Head(seq=0, hash=GENESIS)
    problems: list[str] = []
    count = 0
    for problem in _walk(head, anchors):
        if problem is None:
            count += 1
        elif len(problems) < MAX_PROBLEMS:
            problems.append(problem)
    newest = max(anchors, default=0)
    if newest > head.seq:
        problems.append(f"entry {newest} was anchored, but the log ends at {head.seq}")
    return Report(count, head.seq, head.hash, tuple(problems))


def _walk(head: Head, anchors: dict[int, str]) -> Iterator[str | None]:
    """None for each good entry, a sentence for each problem."""
    previous, expected = GENESIS, 1
    for entry in Entry.objects.filter(seq__lte=head.seq).order_by("seq").iterator(chunk_size=1000):
        if entry.seq != expected:
            yield f"entries {expected} to {entry.seq - 1} are missing"
        if entry.hash != link(previous, entry):
            yield f"entry {entry.seq} is not what was written, or not where it was written"
        elif anchors.get(entry.seq, entry.hash) != entry.hash:
            yield f"entry {entry.seq} is not the one that was anchored"
        else:
            yield None
        previous, expected = entry.hash, entry.seq + 1
    if expected - 1 != head.seq:
        yield f"the head says {head.seq}, but the last entry is {expected - 1}"
    elif previous != head.hash:
        yield "the head's hash is not that of the last entry"
    if Entry.objects.filter(seq__gt=head.seq).exists() and not Head.objects.filter(seq__gt=head.seq).exists():
        yield f"there are entries after the head ({head.seq})"


def missing_triggers() -> list[str]:
    """The triggers that keep the log append-only and are not there."""
    if connection.vendor == "postgresql":
        wanted = {"audit_entry_keep", "audit_entry_keep_all"}
        query = "SELECT tgname FROM pg_trigger WHERE tgrelid = 'audit_entry'::regclass AND tgenabled IN ('O', 'A') AND NOT tgisinternal"
    else:
        wanted = {"audit_entry_keep_update", "audit_entry_keep_delete"}
        query = "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit_entry'"
    with connection.cursor() as cursor:
        cursor.execute(query)
        return sorted(wanted - {name for (name,) in cursor.fetchall()})


def head_problem() -> str:
    """What is wrong at the end of the chain, or nothing; cheap, where `verify` reads every entry."""
    head = Head.objects.filter(pk=1).first()
    last = Entry.objects.order_by("-seq").first()
    if head is None:
        return "the head of the audit log is missing"
    # Entries and head are written in one transaction; between our two reads another may have been.
    if last is not None and last.seq > head.seq:
        head.refresh_from_db()
        last = Entry.objects.filter(seq__lte=head.seq).order_by("-seq").first()
    seq, digest = (last.seq, last.hash) if last else (0, GENESIS)
    return (
        ""
        if (head.seq, head.hash) == (seq, digest)
        else f"the head says {head.seq}, but the last entry is {seq}"
    )


# -- anchors -----------------------------------------------------------------------------------------------------------


def read_anchors(path: Path) -> dict[int, str]:
    """seq -> hash, as they were written outside of the database. A torn line is left out."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return {}
    anchors: dict[int, str] = {}
    for line in lines:
        words = line.split()
        if len(words) == 3 and words[1].isdecimal() and len(words[2]) == len(GENESIS):
            # The first word about an entry counts: who rewrites history later can only add lines.
            anchors.setdefault(int(words[1]), words[2])
    return anchors


def write_anchor(path: Path) -> Head | None:
    """Append the head to the file, as `time seq hash`, when it is not the last line's. Returns it when it was new."""
    head = Head.objects.filter(pk=1).first()
    if head is None or _last_line(path) == [str(head.seq), head.hash]:
        return None
    line = f"{timezone.now().isoformat(timespec='seconds')} {head.seq} {head.hash}\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, ANCHOR_MODE)
    try:
        os.write(descriptor, line.encode())
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return head


def _last_line(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    return lines[-1].split()[1:] if lines else []
