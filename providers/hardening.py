"""What keeps the memory of a process that opens secrets from others (R09); each program that does so asks for it at its start."""

from __future__ import annotations

import ctypes
import resource
import sys

_PR_SET_DUMPABLE = 4  # <linux/prctl.h>


def harden_process() -> None:
    """No core file and no reading of our memory by others of the same user, for this process and what it forks."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0 if hard else hard))
    prctl(_PR_SET_DUMPABLE, 0)


def prctl(option: int, value: int) -> None:
    """Call prctl(2) where there is one; elsewhere do nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
