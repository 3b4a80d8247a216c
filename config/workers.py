"""Several worker processes on one listening socket, and the parent that keeps their number."""

import contextlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator

from uvicorn.config import STARTUP_FAILURE

from providers.hardening import prctl

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_RESPAWN_SECONDS = 0.2  # So that workers that die at once do not keep a processor busy.
_RETRY_SECONDS = 2.0  # After one that could not start.


class Workers:
    """``count`` forked processes that each run ``work`` and share ``sock``.

    A worker that dies is replaced. One of the first that could not start ends them all; one that comes later is tried
    again, since the others still serve: the database may be away. SIGTERM and SIGINT are passed on, and then the workers
    drain. uvicorn's own supervisor pickles and spawns, notices a death late, runs its stock server, and leaves its
    workers listening when it is killed.
    """

    def __init__(
        self,
        work: Callable[[], None],
        *,
        count: int,
        sock: socket.socket,
        ended: Callable[[int], None] = lambda pid: None,
    ) -> None:
        """ended: told the process id of each worker that is no more."""
        self._work, self._count, self._sock, self._ended = work, count, sock, ended
        self._pids: set[int] = set()
        self._stopping = False

    def run(self) -> int:
        """Return the exit code once every worker has ended."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._stop)
        code = 0
        self._fill()
        first = frozenset(self._pids)
        while self._pids:
            pid, status = os.wait()
            self._pids.discard(pid)
            self._ended(pid)
            could_not_start = os.waitstatus_to_exitcode(status) == STARTUP_FAILURE
            if could_not_start and pid in first and not self._stopping:
                code = STARTUP_FAILURE
                self._stop()
            elif not self._stopping:
                time.sleep(_RETRY_SECONDS if could_not_start else _RESPAWN_SECONDS)
                self._fill()
        return code

    def _stop(self, *_: object) -> None:
        self._stopping = True
        self._sock.close()  # Ours must go too, or newcomers would wait in a queue that nobody takes from.
        for pid in self._pids:
            # One may have ended by itself, and is about to be noticed.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _fill(self) -> None:
        while True:
            with _signals_held():  # A stop between a fork and its note here would miss that worker.
                if self._stopping or len(self._pids) == self._count:
                    return
                parent, pid = os.getpid(), os.fork()
                if pid == 0:
                    self._become_worker(parent)
                self._pids.add(pid)

    def _become_worker(self, parent: int) -> None:
        code = 1
        try:
            prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # Without its parent a worker drains too.
            for number in STOP_SIGNALS:
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            if os.getppid() == parent:
                self._work()
            code = 0
        except SystemExit as exc:
            code = exc.code if isinstance(exc.code, int) else 1
        except BaseException:  # noqa: BLE001  # The last word of a process that is about to end.
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
