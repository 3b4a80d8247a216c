"""The keyring's row: opened at start with the right key and no other, and a wrong key changes nothing."""

from __future__ import annotations

import base64
import resource
import secrets
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext

from audit.changes import changes
from config.env import EXAMPLE_KEY
from providers import crypto, keyring
from providers.models import Keyring
from tests.support.gateway import Gateway
from tests.support.processes import REPOSITORY, Process
from tests.support.rows import all_rows, files_with, spellings
from tests.support.upstream import Upstream

START_TIMEOUT = 5.0
CANARY = "sk-CANARY/" + base64.b64encode(secrets.token_bytes(24)).decode() + "+="

# -- in this process ---------------------------------------------------------------------------------------------------


@pytest.mark.django_db
@pytest.mark.usefixtures("ring")
class TestTheRow:
    def test_a_wrong_key_is_refused_with_one_line(self, settings: Any) -> None:
        settings.PENSTOCK_ENCRYPTION_KEY = secrets.token_bytes(32)
        with pytest.raises(keyring.WrongEncryptionKey, match=r"^PENSTOCK_ENCRYPTION_KEY: [^\n]+$"):
            keyring.load()

    def test_a_missing_key_is_refused_with_one_line(self, settings: Any) -> None:
        settings.PENSTOCK_ENCRYPTION_KEY = b""
        with pytest.raises(keyring.WrongEncryptionKey, match=r"^PENSTOCK_ENCRYPTION_KEY: is missing[^\n]+$"):
            keyring.load()

    def test_a_canary_that_does_not_open_is_refused(self) -> None:
        Keyring.objects.update(canary="v1.00000000.AAAA")
        with pytest.raises(keyring.WrongEncryptionKey, match="canary"):
            keyring.load()

    def test_a_canary_that_says_something_else_is_refused(self) -> None:
        Keyring.objects.update(canary=keyring.current().seal("another", aad=crypto.CANARY_AAD))
        with pytest.raises(keyring.WrongEncryptionKey, match="canary"):
            keyring.load()

    def test_it_is_made_once(self) -> None:
        before = list(Keyring.objects.values())
        assert keyring.ensure().primary == before[0]["primary_kid"]
        assert list(Keyring.objects.values()) == before

    def test_looking_for_a_change_is_one_cheap_query(self) -> None:
        keyring.load()
        ring = crypto.current_keyring()
        with CaptureQueriesContext(connection) as queries:
            keyring.load_if_changed()
        assert len(queries) == 1
        assert crypto.current_keyring() is ring

    def test_a_keyring_that_was_not_stored_after_all_is_never_used(self) -> None:
        keyring.load()
        ring = crypto.current_keyring()
        with pytest.raises(ZeroDivisionError), changes(actor=None, via="system"):  # noqa: PT012 - the whole block is what is undone
            keyring.replace(ring.with_new_key())
            raise ZeroDivisionError
        assert crypto.current_keyring() is ring
        assert keyring.current().primary == ring.primary

    def test_a_stored_change_reaches_this_process(self) -> None:
        keyring.load()
        ring = crypto.current_keyring().with_new_key()
        with changes(actor=None, via="system"):
            keyring.replace(ring)
        assert keyring.current() == ring

    def test_the_row_never_shows_what_it_holds(self) -> None:
        row = Keyring.objects.get()
        assert crypto.DOTS in repr(row.canary)
        assert "v1." not in f"{row} {row.canary} {row.canary!r}"


# -- R01 and R04, in processes as they are really started --------------------------------------------------------------

PROCESSES: dict[str, list[str]] = {
    "migrate": ["manage.py", "migrate"],
    "serve": ["manage.py", "serve"],
    "worker": ["-m", "celery", "--app", "config.celery", "worker", "--concurrency=1"],
    "beat": ["-m", "celery", "--app", "config.celery", "beat", "--pidfile="],
}
KEYS = {
    "missing": "",
    "short": base64.urlsafe_b64encode(secrets.token_bytes(31)).decode(),
    "example": EXAMPLE_KEY,
    "wrong": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
}


@pytest.fixture(scope="module")
def installation() -> Iterator[Gateway]:
    """Migrated, with a provider whose key is the canary; nothing runs."""
    with Gateway(start=False) as gateway:
        gateway.provide("http://127.0.0.1:9/v1", api_key=CANARY, key=False)
        yield gateway


def children_cpu() -> float:
    """CPU seconds of all children that have ended: unlike the clock's, they do not grow with what else the machine does."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


# What is refused before the database is asked is refused by the same lines in all of them.
@pytest.mark.no_database
@pytest.mark.parametrize(
    ("process", "which"),
    [(process, which) for process in PROCESSES for which in KEYS if which == "wrong" or process == "serve"],
)
def test_r04_nothing_starts_with_a_key_that_is_not_the_right_one(
    installation: Gateway, process: str, which: str
) -> None:
    before = all_rows(installation)
    env = {**installation.env, "PENSTOCK_ENCRYPTION_KEY": KEYS[which]}
    began = children_cpu()
    with Process([sys.executable, *PROCESSES[process]], name=process, env=env, cwd=REPOSITORY) as started:
        code = started.wait(60)
        took = children_cpu() - began
        said = started.logs()
    assert code != 0
    assert took < START_TIMEOUT
    assert [line for line in said.splitlines() if "PENSTOCK_ENCRYPTION_KEY" in line][1:] == []
    assert "PENSTOCK_ENCRYPTION_KEY: " in said
    assert "Traceback" not in said
    assert all_rows(installation) == before


@pytest.mark.no_database
def test_r01_a_thief_of_the_whole_installation_finds_no_key() -> None:
    with Upstream() as upstream, Gateway() as gateway:
        key = gateway.provide(f"{upstream.url}/v1", api_key=CANARY)
        with gateway.client(key) as client:
            body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
            assert client.post("/v1/chat/completions", json=body).status_code == 200
        gateway.manage("probe")
        gateway.manage("sync_models")
        assert any(CANARY in record.headers.get("authorization", "") for record in upstream.ledger.records)
        assert files_with(gateway.folder, "tiny"), "the search finds what is there"
        assert files_with(gateway.folder, CANARY) == []
        for table, rows in all_rows(gateway).items():
            text = "\n".join(rows)
            assert not any(word.decode() in text for word in spellings(CANARY)), table


@pytest.mark.no_database
def test_r07_the_secret_key_of_django_has_no_part_in_it(installation: Gateway) -> None:
    assert installation.run_manage("doctor").returncode == 0
    other = {"SECRET_KEY": secrets.token_urlsafe(64), "JWT_SIGNING_KEY": secrets.token_urlsafe(64)}
    assert installation.run_manage("doctor", env=other).returncode == 0
