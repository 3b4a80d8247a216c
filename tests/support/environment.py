"""The environment of the test suite, set before Django reads it: a pytest plugin, loaded by `-p` in pyproject.toml.

`PENSTOCK_TEST_DATABASE` is `sqlite` (the default) or `postgresql`; for the latter a real server is started here, once for
all workers. Fresh secrets and a folder of their own; a developer's `.env` and `var/` are never touched.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from typing import Any

from tests.support.installation import fresh_secrets

MARK = "PENSTOCK_TEST_FOLDER"
_ours: list[Any] = []


def _prepare() -> None:
    """Once, in the process that begins; workers inherit the result."""
    folder = tempfile.mkdtemp(prefix="penstock-tests-")
    os.makedirs(os.path.join(folder, "static"))
    os.environ.update(
        fresh_secrets(),
        ENV_FILE=os.path.join(folder, "no.env"),
        DATA_DIR=folder,
        LOG_LEVEL="WARNING",
        RATE_LIMIT_REQUESTS="100000",
        HEALTH_CHECK_ENABLED="true",
    )
    for name in ("DATABASE_URL", "REDIS_URL", "PUBLIC_URL", "HOST", "PORT", "ALLOWED_ORIGINS"):
        os.environ.pop(name, None)
    if os.environ.get("PENSTOCK_TEST_DATABASE", "sqlite") == "postgresql":
        from tests.support.postgres import Postgres

        server = Postgres()
        _ours.append(server)
        os.environ["DATABASE_URL"] = server.url
    os.environ[MARK] = folder
    _ours.append(folder)


if MARK not in os.environ:
    _prepare()


def pytest_report_header() -> list[str]:
    database = "PostgreSQL" if os.environ.get("DATABASE_URL") else "SQLite"
    return [f"backends: {database}, Valkey (from the wheel), Python {sys.version.split()[0]}"]


def pytest_unconfigure() -> None:
    """The one who prepared cleans up."""
    while _ours:
        thing = _ours.pop()
        if isinstance(thing, str):
            shutil.rmtree(thing, ignore_errors=True)
        else:
            thing.stop()
