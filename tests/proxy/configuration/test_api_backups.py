"""Backups through the API: who may, what is answered, and that nobody takes one out unseen."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection

from audit import changes as audit_changes
from audit.changes import changes
from audit.models import Entry, Head
from providers.models import Provider
from proxy.configuration import document
from tests.support.api import V1, anybody, as_, error
from tests.support.configuration import CANARY, empty

pytestmark = pytest.mark.django_db
PATHS = (("get", "admin/backup"), ("post", "admin/backup"), ("post", "admin/providers/restore?dry_run=true"))


@pytest.fixture(autouse=True)
def place(tmp_path: Path, settings: Any, filled: str) -> Path:
    settings.BACKUP_FILE = tmp_path / "backups" / "config_backup.json"
    return Path(settings.BACKUP_FILE)


def test_only_administrators_have_anything_to_do_with_backups(
    person: Callable[..., User], operator: User, viewer: User, stranger: User
) -> None:
    as_(person("second", "administrator")).post(f"{V1}/admin/backup")
    for method, path in PATHS:
        assert getattr(anybody(), method)(f"{V1}/{path}").status_code == 401
        for user in (stranger, viewer, operator, person(f"m-{method}-{len(path)}", "member")):
            assert getattr(as_(user), method)(f"{V1}/{path}").status_code == 403
        assert getattr(as_(User.objects.get(username="second")), method)(f"{V1}/{path}").status_code in {
            200,
            201,
        }


@pytest.mark.skipif(connection.vendor == "postgresql", reason="PostgreSQL never took such a row")
def test_half_of_a_surrogate_pair_that_was_stored_once_stops_no_answer(owner: User, place: Path) -> None:
    with changes(actor=None, via="system"):
        Provider.objects.create(name="old", base_url="http://127.0.0.1:1", metadata={"a": "\ud800 é"})
    client = as_(owner)

    found = client.get(f"{V1}/providers", {"search": "old"}).json()["results"]
    entry = client.get(f"{V1}/audit").json()["results"][0]
    made = client.get(f"{V1}/admin/backup").json()

    assert found[0]["metadata"] == {"a": "\ud800 é"}
    assert entry["changes"]["metadata"] == [None, {"a": "\ud800 é"}]
    assert {"a": "\ud800 é"} in [each["metadata"] for each in made["providers"]]
    assert client.post(f"{V1}/admin/backup").status_code == 201
    assert "\\ud800 é" in place.read_text()
    for page in (f"audit/entry/{entry['id']}", f"providers/provider/{found[0]['id']}"):
        assert client.get(f"/admin/{page}/change/", follow=True).status_code == 200


def test_a_download_is_the_configuration_of_now_and_is_recorded(owner: User) -> None:
    response = as_(owner).get(f"{V1}/admin/backup")

    made = json.loads(response.content)
    assert document.content_of(made) == document.content_of(document.build(sealed=True))
    assert "attachment" in response["Content-Disposition"] and response["Cache-Control"] == "no-store"
    assert CANARY not in response.content.decode()
    entry = Entry.objects.latest("seq")
    assert (entry.action, entry.username, entry.via) == ("export_backup", "owner", "api")


def test_r50_what_cannot_be_recorded_is_not_taken_out(owner: User, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(change: Any) -> None:
        raise audit_changes.AuditUnavailable("the audit log cannot be written")

    monkeypatch.setattr(audit_changes.Change, "write", away)
    response = as_(owner).get(f"{V1}/admin/backup")

    assert error(response)["code"] == "SERVICE_UNAVAILABLE" and "sealed" not in response.content.decode()


def test_a_backup_is_made_on_demand(owner: User, place: Path) -> None:
    response = as_(owner).post(f"{V1}/admin/backup")

    assert response.status_code == 201
    answer = response.json()
    assert (answer["file"], answer["version"]) == ("config_backup.json", Head.objects.get().seq)
    assert answer["bytes"] == place.stat().st_size


def test_a_disk_that_takes_no_backup_is_503(owner: User, settings: Any, place: Path) -> None:
    place.parent.parent.joinpath("file").write_text("")
    settings.BACKUP_FILE = place.parent.parent / "file" / "b.json"
    assert error(as_(owner).post(f"{V1}/admin/backup"))["code"] == "SERVICE_UNAVAILABLE"


@pytest.mark.parametrize("mount", ["/api/v1", "/api", "/api/v1/llm-config"])
def test_a_body_is_restored_after_a_look_at_the_difference(owner: User, mount: str) -> None:
    made = document.build(sealed=True)
    empty()
    client = as_(owner)

    planned = client.post(f"{mount}/admin/providers/restore?dry_run=true", made).json()
    assert planned["dry_run"] is True and not Provider.objects.exists()
    done = client.post(f"{mount}/admin/providers/restore", made).json()

    assert {**planned, "dry_run": False, "changes": []} == {**done, "changes": []}
    assert [change["entity_name"] for change in planned["changes"]] == [
        c["entity_name"] for c in done["changes"]
    ]
    assert document.content_of(document.build(sealed=True)) == document.content_of(made)
    assert set(Entry.objects.order_by("-seq")[: done["changed"]].values_list("via", "username")) == {
        ("restore", "owner")
    }
    assert client.post(f"{mount}/admin/providers/restore", made).json()["changed"] == 0


def test_without_a_body_the_backup_on_the_machine_is_restored(owner: User) -> None:
    client = as_(owner)
    assert error(client.post(f"{V1}/admin/providers/restore"))["code"] == "CONFLICT"
    client.post(f"{V1}/admin/backup")
    empty()

    assert client.post(f"{V1}/admin/providers/restore").json()["changed"] > 5
    assert Provider.objects.filter(slug="box").exists()


def test_pruning_is_asked_for(owner: User) -> None:
    client, made = as_(owner), document.build(sealed=True)
    client.post(f"{V1}/servers", {"name": "Extra", "kind": "ollama", "base_url": "http://127.0.0.1:9102"})

    assert client.post(f"{V1}/admin/providers/restore", made).json()["changed"] == 0
    answer = client.post(f"{V1}/admin/providers/restore?prune=true", made).json()
    assert [change["action"] for change in answer["changes"]] == ["delete_server"]


def test_what_is_wrong_is_told_by_place(owner: User) -> None:
    body = {
        "format": "penstock/1",
        "providers": [{"slug": "a", "name": "A"}, {"name": "B", "base_url": "x", "z": 1}],
    }
    response = as_(owner).post(f"{V1}/admin/providers/restore", body)

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"providers.0.base_url", "providers.1.z"}


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"format": "penstock/2"}',
        b'{"format": "penstock/1", "providers": [{"slug": "a", "slug": "b"}]}',
        b'{"format": "penstock/1", "providers": [' + b"[]," * 150_000 + b"[]]}",
        b'{"format": "penstock/1", "managed_by": 1}',
        b'"text"',
        b"[1]",
    ],
)
def test_a_body_that_would_hurt_is_400(owner: User, body: bytes) -> None:
    head = Head.objects.get().seq
    response = as_(owner).post(f"{V1}/admin/providers/restore", body, content_type="application/json")

    assert response.status_code == 400 and error(response)["message"]
    assert Head.objects.get().seq == head
    response = as_(owner).post(f"{V1}/admin/providers/restore", b"a: b", content_type="application/yaml")
    assert response.status_code == 415


def test_who_owns_a_row_is_shown_and_sent_back_unchanged(owner: User) -> None:
    client = as_(owner)
    body = {
        "format": "penstock/1",
        "managed_by": "platform",
        "providers": [{"slug": "box"}],
        "api_keys": [{"provider": "openai", "name": "team"}],
        "model_routes": [{"name": "fast"}],
        "gateway_keys": [{"name": "chatbot"}],
        "active": [{"purpose": "chat"}],
    }
    assert client.post(f"{V1}/admin/providers/restore", body).json()["changed"] == 5

    for path in (
        "providers?search=box",
        "servers?search=box",
        "api-keys?search=team",
        "model-routes",
        "gateway-keys",
    ):
        found = client.get(f"{V1}/{path}").json()["results"]
        assert [row["managed_by"] for row in found] == ["platform"], path
    assert client.get(f"{V1}/active/chat").json()["managed_by"] == "platform"
    route = client.get(f"{V1}/model-routes").json()["results"][0]
    assert client.put(f"{V1}/model-routes/{route['id']}", route).status_code == 200
    assert client.patch(f"{V1}/model-routes/{route['id']}", {"managed_by": "me"}).status_code == 400
