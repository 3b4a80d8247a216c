"""Counts that all workers of a server share, so that `/metrics` says the same whichever of them is asked.

The client library decides when it is imported whether counts live in the process or in files, and Django imports it long before
a command runs: so a server with several workers begins once more, with the variable that says where the files are.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
PREFIX = "penstock-metrics-"


def share() -> None:
    """Go on with counts in files; returns at once where they already are."""
    if VARIABLE not in os.environ:
        os.environ[VARIABLE] = tempfile.mkdtemp(prefix=PREFIX)
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606  # ourselves, with our own arguments


def forget(pid: int) -> None:
    """A worker has ended: what it measured no longer counts, and what it counted does."""
    from prometheus_client import multiprocess

    multiprocess.mark_process_dead(pid)  # type: ignore[no-untyped-call]  # it has no types


def clear() -> None:
    """Remove the files, if it was we who made their folder."""
    folder = os.environ.get(VARIABLE, "")
    if os.path.basename(folder).startswith(PREFIX):
        shutil.rmtree(folder, ignore_errors=True)
