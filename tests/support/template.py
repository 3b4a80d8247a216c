"""Migrated installations to start from: migrating takes seconds, so it is done once per session and kind of database."""

from __future__ import annotations

import atexit
import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from tests.support.installation import fresh_secrets
from tests.support.ports import LOOPBACK, free_port
from tests.support.postgres import Postgres, create_database, drop_database
from tests.support.processes import REPOSITORY

Database = Literal["sqlite", "postgresql"]
SHARED_FOLDER = "PENSTOCK_TEST_FOLDER"
INHERITED = ("PATH", "HOME", "LANG", "LC_ALL", "TMPDIR")
TEMPLATE = "penstock_template"


@dataclass(frozen=True, slots=True)
class Template:
    """A migrated installation to copy. database: the name of its PostgreSQL database. The keyring in it is bound to the key."""

    data_dir: Path
    encryption_key: str
    database: str = TEMPLATE


@functools.cache
def template_of(database: Database) -> Template:
    """Made once in the session's folder, by whichever worker is first; the others wait for it."""
    # Where the session has no PostgreSQL of its own, each worker has one, and so a template of its own.
    name = "template-sqlite" if database == "sqlite" else f"template-{urlsplit(session_server()).port}"
    folder = shared_folder() / name
    data_dir = folder / "data"
    done = folder / "key"
    with (shared_folder() / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            settings = {**base_settings(data_dir, free_port()), **fresh_secrets()}
            if database == "postgresql":
                drop_database(session_server(), TEMPLATE)
                settings["DATABASE_URL"] = create_database(session_server(), TEMPLATE)
            migrate(settings)
            _wrap_lightly(settings)
            done.touch(mode=0o600)
            done.write_text(settings["PENSTOCK_ENCRYPTION_KEY"])
    return Template(data_dir, done.read_text())


def base_settings(data_dir: Path, port: int, *, health: bool = False) -> dict[str, str]:
    data_dir.parent.mkdir(mode=0o700, exist_ok=True)
    return {
        **{name: os.environ[name] for name in INHERITED if name in os.environ},
        "ENV_FILE": os.devnull,
        "DATA_DIR": str(data_dir),
        "HOST": LOOPBACK,
        "PORT": str(port),
        "LOG_FORMAT": "json",
        "HEALTH_CHECK_ENABLED": str(health).lower(),
        "RATE_LIMIT_REQUESTS": "100000",
        "PYTHONUNBUFFERED": "1",
    }


def migrate(settings: Mapping[str, str]) -> None:
    Path(settings["DATA_DIR"]).mkdir(mode=0o700, parents=True, exist_ok=True)
    _manage(settings, "migrate", "--verbosity=0")


def _wrap_lightly(settings: Mapping[str, str]) -> None:
    """Stretch the encryption key once instead of 600,000 times, which each of hundreds of processes would spend 0.3 s on."""
    _manage(
        settings,
        "shell",
        "--no-imports",
        "--command",
        "from tests.support.fill import wrap_lightly as w; w()",
    )


def _manage(settings: Mapping[str, str], *args: str) -> None:
    command = [sys.executable, "manage.py", *args]
    done = subprocess.run(
        command, cwd=REPOSITORY, env=dict(settings), capture_output=True, text=True, check=False, timeout=120
    )
    if done.returncode:
        raise AssertionError(f"{args[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}")


@functools.cache
def shared_folder() -> Path:
    """The session's folder, which all workers share; without a session, one that goes with this process."""
    if SHARED_FOLDER in os.environ:
        return Path(os.environ[SHARED_FOLDER])
    folder = tempfile.mkdtemp(prefix="penstock-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def default_database() -> Database:
    return "postgresql" if os.environ.get("PENSTOCK_TEST_DATABASE") == "postgresql" else "sqlite"


@functools.cache
def session_server() -> str:
    """The superuser's address of the session's PostgreSQL; one is started for this process where the session has none."""
    shared = os.environ.get("DATABASE_URL", "")
    if shared.startswith("postgresql://"):
        return shared
    server = Postgres()
    atexit.register(server.stop)
    return server.url
