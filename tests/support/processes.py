"""A process that a test started: logged, waited for, and ended by its id."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

REPOSITORY = Path(__file__).resolve().parents[2]
LOG_TAIL = 8000
KILL_TIMEOUT = 5.0


class CannotRun(RuntimeError):
    """A server of the test support cannot run here; the message says which one and why."""


class StartFailed(CannotRun):
    """A process ended, or did not become ready in time; the message ends with its log."""


class Process:
    """A child process in a process group of its own, its output in a file.

    args: the command line, each made text. name: what messages call it. log: where stdout and stderr go (default: a temporary file).
    Further keyword arguments (cwd, env, user, group, extra_groups) are those of `subprocess.Popen`.
    """

    def __init__(
        self,
        args: Sequence[object],
        *,
        name: str,
        log: Path | None = None,
        env: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.name = name
        self.log = log or _temporary_log(name)
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                [str(arg) for arg in args],
                env=None if env is None else dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        _started.add(self)

    def __repr__(self) -> str:
        return f"<{self.name} pid={self.pid} returncode={self.returncode}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @property
    def returncode(self) -> int | None:
        return self._popen.poll()

    @property
    def alive(self) -> bool:
        return self.returncode is None

    def logs(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def family(self) -> list[int]:
        """The ids of this process and of all that descend from it."""
        return [self.pid, *descendants(self.pid)]

    def send_signal(self, number: int) -> None:
        """Send a signal to this process alone."""
        if self.alive:
            self._popen.send_signal(number)

    def pause(self) -> None:
        """Stop this process and its descendants where they are: connections stay open, nothing answers."""
        _signal_each(self.family(), signal.SIGSTOP)

    def resume(self) -> None:
        _signal_each(self.family(), signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL to this process and its descendants, as on a lost machine; returns when all of them are gone."""
        family = self.family() if self.alive else []
        _signal_each(family, signal.SIGKILL)
        self._popen.wait()
        _wait_until_gone(family)
        _started.discard(self)

    def wait(self, timeout: float) -> int:
        """The exit code; TimeoutError, with the log, when it does not come in time."""
        try:
            return self._popen.wait(timeout)
        except subprocess.TimeoutExpired:
            raise TimeoutError(
                f"{self.name} did not end within {timeout} s\n{self.logs()[-LOG_TAIL:]}"
            ) from None

    def stop(self, *, number: int = signal.SIGTERM, timeout: float = 10.0) -> int:
        """Ask it to end and wait; what has not ended by then is killed. Returns the exit code."""
        if self.alive:
            family = self.family()
            self._popen.send_signal(number)
            _signal_each(family, signal.SIGCONT)
            try:
                self._popen.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        code = self._popen.wait()
        _started.discard(self)
        return code

    def wait_until(self, ready: Callable[[], bool], *, timeout: float, every: float = 0.02) -> None:
        """Poll `ready` while the process lives. Raises StartFailed, after killing it, when it ends or time is up."""
        deadline = time.monotonic() + timeout
        while not ready():
            if not self.alive:
                raise StartFailed(f"{self.name} ended with {self.returncode}\n{self.logs()[-LOG_TAIL:]}")
            if time.monotonic() > deadline:
                self.kill()
                raise StartFailed(f"{self.name} was not ready within {timeout} s\n{self.logs()[-LOG_TAIL:]}")
            time.sleep(every)


def descendants(pid: int) -> list[int]:
    """The ids of the children of `pid`, their children, and so on (Linux: read from /proc)."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found += [int(child), *descendants(int(child))]
    return found


def runs(pid: int) -> bool:
    """Whether this process exists and is more than the remains that its parent has not collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def _wait_until_gone(pids: Sequence[int]) -> None:
    deadline = time.monotonic() + KILL_TIMEOUT
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.002)


def _signal_each(pids: Sequence[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _temporary_log(name: str) -> Path:
    handle, path = tempfile.mkstemp(prefix=f"penstock-{name.replace(' ', '-')}-", suffix=".log")
    os.close(handle)
    log = Path(path)
    atexit.register(log.unlink, missing_ok=True)
    return log


_started: weakref.WeakSet[Process] = weakref.WeakSet()


@atexit.register
def _end_what_is_left() -> None:
    for process in list(_started):
        process.kill()
