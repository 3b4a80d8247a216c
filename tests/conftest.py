"""Fixtures for everybody: the database's file, and a small cast of people."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth.models import Group, User
from django.db import connection

from audit.changes import changes
from audit.triggers import lift_triggers


def pytest_collection_finish() -> None:
    """What is loaded by now stays: walking all of it again and again would show in tests that measure time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def django_db_modify_db_settings(django_db_modify_db_settings_parallel_suffix: None) -> None:
    """SQLite's test database is a file, as in real life: in memory it would know neither WAL nor other processes."""
    from django.db import connections

    if connections["default"].vendor == "sqlite":
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        name = str(settings.DATA_DIR / f"test-{worker}.sqlite3")
        connections["default"].settings_dict.setdefault("TEST", {})["NAME"] = name


@pytest.fixture(autouse=True)
def _fast_passwords(settings: Any) -> None:
    """A good hash takes a third of a second, which is its point, and not ours here."""
    settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


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
    marker = request.node.get_closest_marker("django_db")
    if marker is None or not marker.kwargs.get("transaction"):
        yield
        return
    request.getfixturevalue("transactional_db")
    yield
    lift_triggers(connection)
