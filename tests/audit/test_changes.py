"""The one door for changes: nothing watched is written past it, and what is written is told, together or not at all."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import DatabaseError, connection, transaction
from django.test.utils import CaptureQueriesContext

from audit.changes import AuditUnavailable, NotInChanges, changes, current, record
from audit.diff import HIDDEN
from audit.models import Entry, Head
from audit.request_ids import within
from providers import crypto, keyring, keys
from providers.models import ApiKey, HealthCheck, Provider, ProviderHealth, Server, UpstreamModel

pytestmark = pytest.mark.django_db

SECRET = "sk-canary-0123456789abcdef"


def make(name: str = "llama", model: type[Provider] = Provider, **fields: Any) -> Provider:
    return model.objects.create(name=name, base_url="http://127.0.0.1:8080", kind="llamacpp", **fields)


def made(name: str = "llama", **fields: Any) -> Provider:
    with changes(actor=None, via="system"):
        return make(name, **fields)


def last() -> Entry:
    return Entry.objects.latest("seq")


def test_a_watched_row_is_not_written_outside_of_the_door() -> None:
    with pytest.raises(NotInChanges), transaction.atomic():
        make()
    assert not Provider.objects.filter(name="llama").exists()


@pytest.mark.parametrize("model", [Provider, Server])
def test_the_proxy_of_a_watched_model_is_watched_too(model: type[Provider]) -> None:
    with pytest.raises(NotInChanges), transaction.atomic():
        make(model=model)
    with changes(actor=None, via="system"):
        row = make(model=model)
    assert (last().action, last().entity_type, last().entity_id) == ("add_server", "ai_server", str(row.pk))


def test_deleting_outside_of_the_door_is_refused() -> None:
    row = made()
    with pytest.raises(NotInChanges), transaction.atomic():
        row.delete()
    assert Provider.objects.filter(pk=row.pk).exists()


def test_an_entry_says_who_did_what_from_where(operator: User) -> None:
    row = made()
    with changes(actor=operator, via="api", ip="192.0.2.7", request_id="r-7"):
        row.name, row.priority = "renamed", 5
        row.save()
    entry = last()
    assert (entry.action, entry.entity_name, entry.user_id, entry.username) == (
        "update_server",
        "renamed",
        operator.pk,
        "operator",
    )
    assert (entry.via, entry.ip, entry.request_id) == ("api", "192.0.2.7", "r-7")
    assert entry.changes == {"name": ["llama", "renamed"], "priority": [100, 5]}


def test_an_entry_of_a_task_has_the_id_of_what_the_task_belongs_to() -> None:
    with within("from-a-request"), changes(actor=None, via="task"):
        Group.objects.create(name="ml")
    with within("from-a-request"), changes(actor=None, via="api", request_id="said"):
        Group.objects.create(name="support")
    with changes(actor=None, via="task"):
        Group.objects.create(name="sales")

    found = Entry.objects.filter(entity_type="group").order_by("seq").values_list("request_id", flat=True)
    assert [*found][-3:] == ["from-a-request", "said", ""]


def test_a_save_that_changes_nothing_leaves_no_entry() -> None:
    row = made()
    before = Head.objects.get().seq
    with changes(actor=None, via="system"):
        Provider.objects.get(pk=row.pk).save()
    assert Head.objects.get().seq == before


def test_each_changed_row_is_one_entry_and_the_head_counts_them() -> None:
    before = Head.objects.get().seq
    with changes(actor=None, via="system"):
        for name in ("a", "b", "c"):
            make(name)
        row = Provider.objects.get(name="b")
        row.priority = 7
        row.save()
    head = Head.objects.get()
    assert head.seq == before + 3
    assert head.hash == last().hash
    assert Entry.objects.get(entity_name="b").changes["priority"] == [None, 7]


def test_what_is_undone_leaves_no_entry() -> None:
    before = Head.objects.get().seq
    with pytest.raises(ZeroDivisionError), changes(actor=None, via="system"):  # noqa: PT012 - the whole block is what is undone
        make()
        raise ZeroDivisionError
    assert Head.objects.get().seq == before
    assert not Provider.objects.filter(name="llama").exists()


def test_r50_a_change_that_cannot_be_recorded_is_not_made() -> None:
    before = Head.objects.get().seq
    with pytest.raises(AuditUnavailable), changes(actor=None, via="system") as change:  # noqa: PT012 - the whole block is what is undone
        make()
        change.head.seq = -10  # the next number is taken
        Entry.objects.create(seq=-9, timestamp="2030-01-01T00:00:00Z", action="x", hash="x")
    assert not Provider.objects.filter(name="llama").exists()
    assert Head.objects.get().seq == before


def test_blocks_nest_and_the_outer_one_decides() -> None:
    before = Head.objects.get().seq
    with pytest.raises(ZeroDivisionError), changes(actor=None, via="system") as outer:  # noqa: PT012 - the whole block is what is undone
        with changes(actor=None, via="api") as inner:
            make()
        assert inner is outer
        raise ZeroDivisionError
    assert Head.objects.get().seq == before
    with pytest.raises(NotInChanges):
        current()


def test_the_head_is_locked_before_anything_else() -> None:
    with CaptureQueriesContext(connection) as queries, changes(actor=None, via="system"):
        make()
    statements = [
        query["sql"] for query in queries if not query["sql"].startswith(("SAVEPOINT", "RELEASE", "BEGIN"))
    ]
    assert "audit_head" in statements[0]
    if connection.vendor == "postgresql":
        assert "FOR UPDATE" in statements[0]


def test_a_secret_appears_only_as_dots() -> None:
    keyring.ensure()
    row = made()
    with changes(actor=None, via="system"):
        keys.write_default(row, SECRET)
    first = Entry.objects.get(action="add_key")
    assert first.changes["secret"] == ["", HIDDEN] or first.changes["secret"] == [None, HIDDEN]
    with changes(actor=None, via="system"):
        keys.write_default(row, SECRET + "-changed")
    assert last().changes["secret"] == [HIDDEN, HIDDEN]
    told = str(list(Entry.objects.values()))
    assert SECRET not in told
    assert "v1." not in told
    assert str(crypto.current_keyring().primary) not in str(first.changes)


def test_a_password_appears_only_as_dots(owner: User) -> None:
    with changes(actor=owner, via="admin"):
        owner.set_password("another long password")
        owner.save()
    assert last().changes["password"] == [HIDDEN, HIDDEN]
    assert "pbkdf2" not in str(list(Entry.objects.values()))


def test_giving_somebody_a_role_is_told(stranger: User) -> None:
    with changes(actor=None, via="system"):
        stranger.groups.add(Group.objects.get(name="viewer"))
    assert "viewer" not in last().entity_name
    assert last().entity_name == "stranger"
    assert last().changes


def test_deleting_tells_what_was_there_and_what_went_with_it() -> None:
    row = made()
    with changes(actor=None, via="system"):
        UpstreamModel.objects.create(provider=row, name="tiny")
    number = row.pk
    with changes(actor=None, via="system"):
        row.delete()
    entry = Entry.objects.get(action="delete_server")
    assert entry.entity_id == str(number)
    assert entry.changes["base_url"] == ["http://127.0.0.1:8080", None]
    assert Entry.objects.filter(action="delete_model", entity_name="llama/tiny").exists()


def test_health_and_counters_need_no_door_and_leave_no_trace() -> None:
    row = made()
    before = Head.objects.get().seq
    ProviderHealth.objects.create(provider=row)
    HealthCheck.objects.create(provider=row, status="online")
    ProviderHealth.objects.update(status="online")
    assert Head.objects.get().seq == before


def test_a_bulk_operation_is_told_as_one_entry() -> None:
    row = made()
    with changes(actor=None, via="task"):
        UpstreamModel.objects.bulk_create(
            UpstreamModel(provider=row, name=f"m{number}") for number in range(3)
        )
        record(row, verb="update", before={"models": []}, after={"models": ["m0", "m1", "m2"]})
    assert (last().action, last().changes) == ("update_server", {"models": [[], ["m0", "m1", "m2"]]})


@pytest.mark.parametrize("statement", ["UPDATE audit_entry SET username = 'x'", "DELETE FROM audit_entry"])
def test_the_database_itself_refuses_to_edit_the_log(statement: str) -> None:
    made()
    before = list(Entry.objects.values())
    with (
        pytest.raises(DatabaseError, match="append-only"),
        transaction.atomic(),
        connection.cursor() as cursor,
    ):
        cursor.execute(statement)
    assert list(Entry.objects.values()) == before


def test_postgresql_refuses_to_empty_the_log() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has no TRUNCATE")
    made()
    with (
        pytest.raises(DatabaseError, match="append-only"),
        transaction.atomic(),
        connection.cursor() as cursor,
    ):
        cursor.execute("TRUNCATE audit_entry")


def test_api_keys_of_a_deleted_provider_are_told_too() -> None:
    keyring.ensure()
    row = made()
    with changes(actor=None, via="system"):
        keys.write_default(row, SECRET)
        row.delete()
    assert not ApiKey.objects.exists()
    assert Entry.objects.filter(action="delete_key").count() == 1
