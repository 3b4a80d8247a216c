"""F41, F42: one process migrates, the others wait; code and tables that do not fit together do not run together."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.core.management.commands.migrate import Command as DjangoCommand
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder

from config.management.commands import migrate
from config.schema_version import newer_problem, older_problem
from tests.support.gateway import Gateway
from tests.support.installation import fresh_secrets
from tests.support.ports import free_port
from tests.support.postgres import create_database, drop_database
from tests.support.processes import REPOSITORY
from tests.support.template import base_settings, default_database, session_server

pytestmark = pytest.mark.timeout(400)
"""Each of these starts several processes, which takes its time on a busy machine."""


@pytest.fixture
def empty(tmp_path: Path) -> Any:
    """The settings of an installation whose database has no tables yet."""
    settings = {**base_settings(tmp_path / "data", free_port()), **fresh_secrets()}
    (tmp_path / "data").mkdir(mode=0o700, exist_ok=True)
    if default_database() == "sqlite":
        yield settings
        return
    settings["DATABASE_URL"] = create_database(session_server(), "penstock_five")
    yield settings
    drop_database(session_server(), "penstock_five")


def test_f41_of_five_concurrent_migrates_one_works_and_four_find_it_done(empty: dict[str, str]) -> None:
    command = [sys.executable, "manage.py", "migrate", "--no-input"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}

    started = [subprocess.Popen(command, cwd=REPOSITORY, env=empty, **pipes) for _ in range(5)]
    try:
        printed = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()

    assert [process.returncode for process in started] == [0] * 5, printed
    assert sum("Applying providers.0001_initial" in text for text in printed) == 1
    assert sum("No migrations to apply" in text for text in printed) == 4


@pytest.mark.no_database
def test_f41_django_opens_no_database_before_it_is_this_process_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    @contextmanager
    def turn() -> Iterator[None]:
        order.append("turn")
        yield

    monkeypatch.setattr(migrate, "alone", turn)
    monkeypatch.setattr(migrate, "newer_problem", lambda: "")
    monkeypatch.setattr(migrate.Command, "check", lambda self, **options: order.append("checks"))
    monkeypatch.setattr(DjangoCommand, "handle", lambda self, **options: order.append("migrates"))
    call_command("migrate", skip_checks=False)

    assert order == ["turn", "checks", "migrates"]


@pytest.mark.django_db
def test_the_tables_are_those_of_this_version() -> None:
    assert (newer_problem(), older_problem()) == ("", "")


@pytest.mark.django_db
def test_f42_an_older_version_refuses_to_migrate_and_says_why() -> None:
    MigrationRecorder(connection).record_applied("proxy", "9999_from_the_future")

    with pytest.raises(CommandError, match=r"newer version \(it has proxy\.9999_from_the_future\)"):
        call_command("migrate")


@pytest.mark.django_db
def test_tables_of_others_are_none_of_our_business() -> None:
    MigrationRecorder(connection).record_applied("someone_else", "0001_initial")

    assert newer_problem() == ""


def newer(gateway: Gateway) -> None:
    gateway.shell(
        "from django.db import connection\n"
        "from django.db.migrations.recorder import MigrationRecorder\n"
        "MigrationRecorder(connection).record_applied('audit', '9999_future')"
    )


def older(gateway: Gateway) -> None:
    gateway.shell(
        "from django.db import connection\n"
        "from django.db.migrations.recorder import MigrationRecorder\n"
        "MigrationRecorder(connection).record_unapplied('proxy', '0006_usage_hours')"
    )


@pytest.mark.parametrize(("spoil", "word"), [(newer, "newer version"), (older, "run manage.py migrate")])
def test_f42_neither_server_nor_worker_nor_beat_starts_on_tables_that_do_not_fit(
    spoil: Callable[[Gateway], None], word: str
) -> None:
    celery = (sys.executable, "-m", "celery", "--quiet", "--app", "config.celery")
    with Gateway(start=False) as gateway:
        spoil(gateway)
        commands = (
            (sys.executable, "manage.py", "serve"),
            (*celery, "worker", "--concurrency=1"),
            (*celery, "beat", "--pidfile="),
        )
        # Which of the two it is, is told by the same lines in all of them.
        for command in commands if spoil is newer else commands[:1]:
            done = subprocess.run(
                command,
                cwd=REPOSITORY,
                env=gateway.env,
                capture_output=True,
                text=True,
                check=False,
                timeout=120,
            )
            assert done.returncode != 0, command
            assert word in done.stderr, (command, done.stderr)
            assert "Traceback" not in done.stderr
