"""What the operating system booked for a process: CPU time and memory, from /proc (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


def seconds(pids: Iterable[int]) -> float:
    """User and system time of these processes so far; children that ended and were waited for are not in it."""
    # After the name in parentheses, which may hold spaces, utime and stime are fields 14 and 15 of proc(5), so 11 and 12.
    fields = (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids)
    return sum(int(each[11]) + int(each[12]) for each in fields) * TICK_SECONDS


def resident_mebibytes(pids: Iterable[int]) -> float:
    """Resident memory of these processes together; shared pages count for each."""
    page = os.sysconf("SC_PAGE_SIZE")
    return sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in pids) * page / 2**20
