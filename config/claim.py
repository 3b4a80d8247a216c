"""What one launcher must have to itself before anything is started: its data directory and its port."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from config.greeting import Address


class Refused(Exception):
    """Why the gateway is not started; one line for a person."""


class AlreadyRunning(Exception):
    """Another launcher has this data directory."""


def make_data_dir(path: Path) -> Path:
    """The data directory, private to this user."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise Refused(f"DATA_DIR {path} cannot be used: {error.strerror}") from error
    return path


@contextlib.contextmanager
def only_one(data_dir: Path) -> Iterator[int]:
    """Hold the data directory; AlreadyRunning says where the launcher that has it listens.

    The lock goes with the process, so a killed launcher leaves none.
    """
    lock = os.open(data_dir / "launch.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(
                os.pread(lock, 500, 0).decode() or "an address that is not known yet"
            ) from None
        os.ftruncate(lock, 0)
        yield lock
    finally:
        os.close(lock)


def write_address(lock: int, address: Address) -> None:
    os.pwrite(lock, f"{address.public_url} (process {os.getpid()})".encode(), 0)


def refuse_taken_port(address: Address) -> None:
    try:
        found = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, where = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Refused(
                f"port {address.port} on {address.host} is in use by another program; choose another with: "
                f"make run PORT={min(address.port + 1, 65535)}"
            ) from error
        raise Refused(
            f"cannot listen on HOST {address.host}, PORT {address.port}: {error.strerror}"
        ) from error
