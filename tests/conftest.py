"""Fixtures for everybody: the database's file, and a small cast of people."""

from __future__ import annotations

import functools
import gc
import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from django.conf import settings
from django.contrib.auth.models import Group, User
from django.db import connection
from httpx._transports import default

from audit.changes import changes
from audit.triggers import lift_triggers
from providers import crypto

WITHOUT_A_DATABASE = ("proxy", "providers", "audit", "security", "docs", "support")
"""Folders of tests where one that asks for no database, and starts no process that would have one, has none."""
ASKING = frozenset({"db", "transactional_db", "django_db_setup", "live_server"})
STARTING = frozenset({"Gateway", "Installation", "Process", "subprocess"})
"""Names by which a module starts processes."""


_numbers = itertools.count()

# How fast inputs are made says something about what else this machine does, and nothing about us.
hypothesis.settings.register_profile(
    "shared machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("shared machine")

# Every client would read all certificates of the world, which takes longer than most of what it is then used for.
_httpx: Any = default
_httpx.create_ssl_context = functools.cache(_httpx.create_ssl_context)

# Every keyring that is made or opened takes a third of a second, which is its point; for processes that are started it still does.
_stretch = crypto._stretch
crypto._stretch = lambda encryption_key, salt, rounds: _stretch(encryption_key, salt, 1 + rounds // 10_000)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Who starts processes shares them with the other tests of his module, and so with their worker; but who leaves an emptied
    database behind comes when nobody of his worker needs one any more, which is last.

    What has nothing to do with a database is run once, whichever there is (see the marker in pyproject.toml).
    """
    folder = item.path.relative_to(Path(__file__).parent).parts[0]
    starting = not STARTING.isdisjoint(vars(getattr(item, "module", None)))
    if starting and not _empties_the_database(item) and item.get_closest_marker("xdist_group") is None:
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
    if folder in WITHOUT_A_DATABASE and not (starting or _asks_for_a_database(item)):
        item.add_marker(pytest.mark.no_database)


def _empties_the_database(item: pytest.Item) -> bool:
    marker = item.get_closest_marker("django_db")
    return marker is not None and bool(marker.kwargs.get("transaction"))


def _asks_for_a_database(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())
    return item.get_closest_marker("django_db") is not None or not ASKING.isdisjoint(fixtures)


def pytest_collection_finish() -> None:
    """What is loaded by now stays: walking all of it again and again would show in tests that measure time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def django_db_keepdb() -> bool:
    """The server, or the folder, goes with the session."""
    return True


@pytest.fixture(scope="session")
def django_db_modify_db_settings(django_db_modify_db_settings_parallel_suffix: None) -> None:
    """SQLite's test database is a file, as in real life: in memory it would know neither WAL nor other processes."""
    from django.db import connections

    if connections["default"].vendor == "sqlite":
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        name = str(settings.DATA_DIR / f"test-{worker}.sqlite3")
        connections["default"].settings_dict.setdefault("TEST", {})["NAME"] = name


@pytest.fixture(autouse=True)
def _fast(settings: Any) -> None:
    """A good hash takes a third of a second, which is its point, and every test client would look at all static files."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
    settings.WHITENOISE_AUTOREFRESH = True


@pytest.fixture(autouse=True)
def _own_backup(settings: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test finds the backup of another; the folder is made by who writes into it."""
    settings.BACKUP_FILE = tmp_path_factory.getbasetemp() / f"backups-{next(_numbers)}" / "config_backup.json"


@pytest.fixture
def person(db: None) -> Callable[..., User]:
    """Make a user in a role: `person("eve", "viewer")`; no role is a stranger."""

    def make(name: str, role: str = "", **fields: Any) -> User:
        with changes(actor=None, via="system"):
            user = User.objects.create_user(name, f"{name}@example.com", "correct horse battery", **fields)
            if role:
                user.groups.add(Group.objects.get(name=role))
                user.is_staff = role in {"viewer", "operator", "administrator"}
                user.save()
        return user

    return make


@pytest.fixture
def owner(person: Callable[..., User]) -> User:
    """The administrator of the installation."""
    return person("owner", is_staff=True, is_superuser=True)


@pytest.fixture
def operator(person: Callable[..., User]) -> User:
    return person("operator", "operator")


@pytest.fixture
def viewer(person: Callable[..., User]) -> User:
    return person("viewer", "viewer")


@pytest.fixture
def stranger(person: Callable[..., User]) -> User:
    return person("stranger")


@pytest.fixture(autouse=True)
def _emptying_is_allowed(request: pytest.FixtureRequest) -> Iterator[None]:
    """Tests that commit are followed by an emptying of all tables, which the audit log's triggers would refuse.

    They are made again after it, as after every migrate.
    """
    if not _empties_the_database(request.node):
        yield
        return
    request.getfixturevalue("transactional_db")
    yield
    lift_triggers(connection)
