"""Python code inside Django, with the settings of whichever installation: in a process that was forked for it.

Starting Django takes two seconds, and tests look into databases, and fill them, hundreds of times. So each test session has one process
that has started Django and touches nothing; for each piece of code it forks, and the fork reads its settings anew. What people start, the
programs and the commands of `manage.py`, is started as people start it, and not here.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import json
import os
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping
from typing import IO, Any

from tests.support.installation import fresh_secrets
from tests.support.processes import REPOSITORY, Process
from tests.support.template import base_settings, shared_folder

TIMEOUT = 120.0


class Inside:
    """The process that forks. Threads may share it: their pieces of code run one after the other."""

    def __init__(self, env: Mapping[str, str]) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "tests.support.inside", str(theirs.fileno())]
            fds = (theirs.fileno(),)
            self._process = Process(command, name="inside", env=env, cwd=REPOSITORY, pass_fds=fds)
        ours.settimeout(TIMEOUT)
        self._socket, self._file = ours, ours.makefile("rw")
        self._lock = threading.Lock()
        atexit.register(self.stop)

    def run(self, code: str, env: Mapping[str, str]) -> str:
        """What `code` printed, with `env` as its environment. AssertionError with all of it when it raised."""
        with self._lock:
            self._file.write(json.dumps({"code": code, "env": dict(env)}) + "\n")
            self._file.flush()
            line = self._file.readline()
        if not line:
            raise AssertionError(f"the process that forks has ended\n{self._process.logs()}")
        done = json.loads(line)
        if done["status"]:
            raise AssertionError(f"the code failed\n{done['out']}{done['err']}")
        return str(done["out"])

    def stop(self) -> None:
        self._socket.close()
        self._process.stop()


@functools.cache
def inside() -> Inside:
    """That of this process's tests."""
    folder = shared_folder() / f"inside-{os.getpid()}"
    return Inside({**base_settings(folder / "data", 9), **fresh_secrets()})


# -- in the process itself ---------------------------------------------------------------------------------------------


def main(channel: socket.socket) -> None:
    """Answer until the other side closes: a line of JSON with code and environment, a line with what came of it."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    import django

    django.setup()
    importlib.import_module("tests.support.fill")
    with channel.makefile("rw") as file:
        for line in file:
            file.write(json.dumps(_forked(**json.loads(line))) + "\n")
            file.flush()


def _forked(code: str, env: dict[str, str]) -> dict[str, Any]:
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        pid = os.fork()
        if pid == 0:
            _run(code, env, out, err)
        _, status = os.waitpid(pid, 0)
        out.seek(0)
        err.seek(0)
        return {"status": status, "out": out.read(), "err": err.read()}


def _run(code: str, env: dict[str, str], out: IO[str], err: IO[str]) -> None:
    """Never returns."""
    status = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        _settle(env)
        exec(compile(code, "<inside>", "exec"), {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _settle(env: dict[str, str]) -> None:
    """Take this environment for one's own: read the settings anew, and forget the database that nobody has opened yet."""
    from django.conf import settings
    from django.db import connections

    os.environ.clear()
    os.environ.update(env)
    fresh = importlib.reload(sys.modules["config.settings"])
    for name in filter(str.isupper, dir(fresh)):
        setattr(settings, name, getattr(fresh, name))
    for alias in list(connections):
        del connections[alias]
    connections.__dict__.pop("settings", None)
    connections._settings = None  # type: ignore[attr-defined]


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
