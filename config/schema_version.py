"""Whether this code and the database's tables fit together, and who may change the tables now."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from django.conf import settings
from django.core.management.base import CommandError
from django.db import DatabaseError, connection
from django.db.migrations.loader import MigrationLoader
from django.db.migrations.recorder import MigrationRecorder

from audit.postgres import SERVER

OURS = frozenset({"audit", "providers", "proxy"})
LOCK = 0x70656E73746F636B
"""The key of the advisory lock: the ASCII text "penstock"."""
MIGRATION_SECONDS = 3600.0
"""One statement of a migration may take so long: it may have millions of rows to write."""
RETRY_SECONDS = 0.2


def newer_problem() -> str:
    """What is wrong when the database was migrated by a newer version than this one, or nothing. Raises DatabaseError."""
    known = set(MigrationLoader(None).disk_migrations)
    unknown = sorted(key for key in _applied() if key not in known)
    if not unknown:
        return ""
    names = ", ".join(f"{app}.{name}" for app, name in unknown[:3])
    return (
        f"DATABASE_URL: the database belongs to a newer version (it has {names}); "
        "start that version, or restore a backup from before the upgrade"
    )


def older_problem() -> str:
    """What is wrong when the database lacks tables that this code needs, or nothing. Raises DatabaseError."""
    applied = set(_applied())
    missing = [key for key in MigrationLoader(None).disk_migrations if key[0] in OURS and key not in applied]
    return f"DATABASE_URL: {len(missing)} migrations are missing; run manage.py migrate" if missing else ""


def _applied() -> list[tuple[str, str]]:
    return [key for key in MigrationRecorder(connection).applied_migrations() if key[0] in OURS]


@contextmanager
def alone() -> Iterator[None]:
    """One migrating process at a time; others wait here, and then find that everything is done."""
    with _alone_on_postgresql() if connection.vendor == "postgresql" else _alone_here():
        yield


@contextmanager
def _alone_on_postgresql() -> Iterator[None]:
    """An advisory lock of this session, asked for again and again, because `lock_timeout` would end a wait for it."""
    with connection.cursor() as cursor:
        while True:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])
            if cursor.fetchone() == (True,):
                break
            time.sleep(RETRY_SECONDS)
        cursor.execute("SET statement_timeout = 0")
    try:
        with SERVER.patience(MIGRATION_SECONDS):
            yield
    finally:
        # A connection that broke has taken its lock along.
        with suppress(DatabaseError), connection.cursor() as cursor:
            cursor.execute("SELECT pg_advisory_unlock(%s)", [LOCK])
            cursor.execute("RESET statement_timeout")


@contextmanager
def _alone_here() -> Iterator[None]:
    try:
        settings.DATA_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = settings.DATA_DIR.joinpath("migrate.lock").open("w")
    except OSError as error:
        raise CommandError(f"DATA_DIR: {settings.DATA_DIR} cannot be written ({error.strerror})") from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
