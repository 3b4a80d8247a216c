"""What the watcher's thread writes back of what requests saw."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection, connections

from audit.changes import changes
from audit.models import Entry, Head
from audit.verify import verify
from providers import keys
from providers.fields import raw
from providers.models import ApiKey, KeyUse, Provider
from proxy.watcher import Watcher
from tests.providers.conftest import provide, ring
from tests.support.api import V1, as_

__all__ = ["provide", "ring"]

pytestmark = pytest.mark.django_db(transaction=True)


class Clock:
    """Each look is more than a second after the last."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 1.5
        return self.now


@pytest.fixture
def broken(provide: Callable[..., Provider]) -> ApiKey:
    """A key whose sealed value was changed behind our back."""
    provider = provide("broken", "http://127.0.0.1:9/v1", api_key="sk-of-the-first-0123456789")
    key = ApiKey.objects.get(provider=provider)
    spoil(key)
    return key


def spoil(key: ApiKey) -> None:
    sealed = raw(ApiKey.objects.get(pk=key.pk).secret)
    middle = len(sealed) - 20
    flipped = "A" if sealed[middle] != "A" else "B"
    ApiKey.objects.filter(pk=key.pk).update(secret=sealed[:middle] + flipped + sealed[middle + 1 :])


def told() -> list[Entry]:
    return list(Entry.objects.filter(action="undecryptable_key"))


def look(*key_ids: int) -> Watcher:
    """One worker's watcher, after requests have found these keys not to open."""
    watcher = Watcher(Clock())
    for key_id in key_ids:
        watcher.undecryptable(key_id)
    watcher.refresh()
    return watcher


def test_r03_a_key_that_does_not_open_is_told_to_the_audit_log_once(broken: ApiKey, tmp_path: Path) -> None:
    watcher = look(broken.pk)
    for _ in range(3):
        watcher.undecryptable(broken.pk)
        watcher.refresh()
    look(broken.pk)

    (entry,) = told()
    assert (entry.entity_type, entry.entity_id, entry.entity_name) == ("api_key", str(broken.pk), str(broken))
    assert (entry.via, entry.user_id, entry.username) == ("system", None, "")
    assert list(entry.changes) == ["undecryptable_at"]
    assert KeyUse.objects.get(api_key=broken).undecryptable_at is not None
    assert verify(tmp_path / "no anchors").ok


def test_a_refused_key_that_is_deleted_meanwhile_holds_up_no_other(provide: Callable[..., Provider]) -> None:
    gone, here = (
        ApiKey.objects.get(
            provider=provide(name, f"http://127.0.0.1:{port}/v1", api_key=f"sk-of-{name}-0123456789")
        )
        for name, port in (("first", 9), ("second", 8))
    )
    watcher = Watcher(Clock())
    watcher.refresh()
    number = gone.pk
    with changes(actor=None, via="system"):
        gone.delete()
    watcher.rejected(number)
    watcher.rejected(here.pk)
    watcher.refresh()

    assert KeyUse.objects.get(api_key=here).rejected_at is not None
    assert not watcher._rejected


def test_r03_of_many_workers_at_once_one_writes_the_entry(broken: ApiKey) -> None:
    together = threading.Barrier(4)
    failed: list[BaseException] = []

    def work() -> None:
        try:
            watcher = Watcher(Clock())
            watcher.refresh()
            watcher.undecryptable(broken.pk)
            together.wait(10)
            watcher.refresh()
        except BaseException as error:
            failed.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)

    assert not failed
    assert len(told()) == 1


def test_r03_what_the_key_has_done_so_far_stays(broken: ApiKey) -> None:
    KeyUse.objects.create(api_key=broken, requests_count=7)
    look(broken.pk)
    use = KeyUse.objects.get(api_key=broken)
    assert (use.requests_count, use.undecryptable_at is None) == (7, False)
    assert len(told()) == 1


def test_r03_a_value_that_was_replaced_meanwhile_is_not_called_broken(broken: ApiKey) -> None:
    with changes(actor=None, via="system"):
        keys.write_default(broken.provider, "sk-a-new-one-0123456789")
    before = Head.objects.get().seq

    look(broken.pk, 123456)

    assert not told() and not KeyUse.objects.filter(undecryptable_at__isnull=False).exists()
    assert Head.objects.get().seq == before


def test_r03_a_new_secret_ends_it_and_may_break_again(broken: ApiKey) -> None:
    look(broken.pk)
    with changes(actor=None, via="system"):
        keys.write_default(broken.provider, "sk-a-new-one-0123456789")
    assert KeyUse.objects.get(api_key=broken).undecryptable_at is None
    spoil(broken)
    look(broken.pk)
    assert len(told()) == 2


@contextmanager
def closed_audit_log() -> Iterator[None]:
    """An audit log that takes no entries, as when its disk is full."""
    if connection.vendor == "sqlite":
        make = "CREATE TRIGGER full BEFORE INSERT ON audit_entry BEGIN SELECT RAISE(ABORT, 'disk full'); END"
        undo = "DROP TRIGGER full"
    else:
        make = "ALTER TABLE audit_entry ADD CONSTRAINT full_disk CHECK (seq < 0) NOT VALID"
        undo = "ALTER TABLE audit_entry DROP CONSTRAINT full_disk"
    with connection.cursor() as cursor:
        cursor.execute(make)
    try:
        yield
    finally:
        with connection.cursor() as cursor:
            cursor.execute(undo)


def test_r03_while_the_audit_log_takes_nothing_all_else_goes_on_and_it_is_told_later(
    broken: ApiKey, caplog: pytest.LogCaptureFixture
) -> None:
    with closed_audit_log():
        watcher = look(broken.pk)
        answered = watcher.answered_at
        watcher.rejected(broken.pk)
        watcher.refresh()
        watcher.refresh()
        assert not told()
        assert KeyUse.objects.get(api_key=broken).undecryptable_at is None
        assert watcher.answered_at > answered
        assert watcher.weather.rejected == {broken.pk}
    said = [each.getMessage() for each in caplog.records if each.name == "proxy.watcher"]
    assert len(said) == 1 and "could not be recorded" in said[0]

    watcher.refresh()

    assert len(told()) == 1


def test_r03_the_api_and_the_admin_show_it(
    provide: Callable[..., Provider], owner: User, client: Any
) -> None:
    vendor = provide(
        "vendor", "https://api.example.com/v1", kind="groq", api_key="sk-of-the-vendor-0123456789"
    )
    key = ApiKey.objects.get(provider=vendor)
    path = f"{V1}/api-keys/{key.pk}"
    assert as_(owner).get(path).json()["undecryptable_at"] is None
    spoil(key)
    look(key.pk)
    etag = as_(owner).get(path)["etag"]

    assert as_(owner).get(path).json()["undecryptable_at"]
    client.force_login(owner, backend="django.contrib.auth.backends.ModelBackend")
    assert "does not open" in client.get("/admin/providers/apikey/").content.decode()

    response = as_(owner).patch(path, {"api_key": "sk-a-new-one-0123456789"}, headers={"if-match": etag})
    assert (response.status_code, response.json()["undecryptable_at"]) == (200, None)
