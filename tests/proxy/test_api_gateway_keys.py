"""Gateway keys through the API: issued once, rotated, revoked; a member sees his own."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.conf import LazySettings
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIClient

from audit.changes import changes
from audit.models import Entry
from proxy import keys
from proxy.models import GatewayKey
from proxy.snapshot import build
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/gateway-keys"


def issue(client: APIClient, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, {"name": "app", **fields})
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def test_a_key_is_shown_once(operator: User) -> None:
    client = as_(operator)
    made = issue(client, requests_per_minute=60, allowed_models=["gpt-*"], allowed_networks=["10.0.0.0/8"])
    parts = keys.parse(made["key"])
    assert parts is not None
    later = [client.get(f"{PATH}/{made['id']}").json(), client.get(PATH).json()]

    assert made["prefix"] == f"pen_live_{parts.key_id}"
    assert made["last4"] == made["key"][-4:]
    assert (made["requests_per_minute"], made["created_by"], made["enabled"]) == (60, "operator", True)
    assert parts.secret not in json.dumps(later)
    assert parts.secret not in json.dumps(list(Entry.objects.values_list("changes", flat=True)))


def test_rotating_gives_a_new_secret_and_keeps_the_old_one_for_a_while(operator: User) -> None:
    client = as_(operator)
    made = issue(client)
    before = GatewayKey.objects.get()

    response = client.post(f"{PATH}/{made['id']}/rotate", {"overlap_seconds": 60})

    assert response.status_code == 200
    assert response.json()["key"] != made["key"]
    assert response.json()["prefix"] == made["prefix"]
    after = GatewayKey.objects.get()
    assert after.previous_hmac.raw() == before.hmac.raw()
    assert client.post(f"{PATH}/{made['id']}/rotate", {"overlap_seconds": -1}).status_code == 400
    assert client.post(f"{PATH}/{made['id']}/rotate", {"colour": 1}).status_code == 400


def test_a_revoked_key_stays_revoked(owner: User) -> None:
    client = as_(owner)
    made = issue(client)
    path = f"{PATH}/{made['id']}"

    revoked = client.post(f"{path}/revoke").json()

    assert revoked["enabled"] is False
    assert revoked["revoked_at"] is not None
    assert client.post(f"{path}/revoke").json()["revoked_at"] == revoked["revoked_at"]
    assert error(client.post(f"{path}/rotate"))["code"] == "CONFLICT"
    assert client.patch(path, {"enabled": True}).status_code == 409
    assert GatewayKey.objects.get().usable is False


def test_an_operator_issues_rotates_and_revokes_and_changes_nothing_else(operator: User, owner: User) -> None:
    made = issue(as_(operator))
    path = f"{PATH}/{made['id']}"

    assert as_(operator).patch(path, {"requests_per_minute": 5}).status_code == 403
    assert as_(operator).delete(path).status_code == 403
    assert as_(owner).patch(path, {"requests_per_minute": 5}).json()["requests_per_minute"] == 5
    assert as_(owner).delete(path).status_code == 204


def test_a_member_has_his_own_keys_and_no_others(operator: User, person: Callable[..., User]) -> None:
    member, other = person("mia", "member"), person("max", "member")
    mine = issue(as_(operator), name="mine", owner="mia")
    theirs = issue(as_(operator), name="theirs", owner=other.pk)
    client = as_(member)

    assert [row["name"] for row in client.get(PATH).json()["results"]] == ["mine"]
    assert client.get(f"{PATH}/{mine['id']}").json()["owner"] == "mia"
    assert "key" in client.post(f"{PATH}/{mine['id']}/rotate").json()
    assert client.post(f"{PATH}/{mine['id']}/revoke").status_code == 200
    for response in (
        client.get(f"{PATH}/{theirs['id']}"),
        client.post(f"{PATH}/{theirs['id']}/rotate"),
        client.post(f"{PATH}/{theirs['id']}/revoke"),
    ):
        assert response.status_code == 404
        assert error(response)["code"] == "NOT_FOUND"
    assert client.post(PATH, {"name": "x"}).status_code == 403
    assert client.patch(f"{PATH}/{mine['id']}", {"name": "y"}).status_code == 403
    assert client.delete(f"{PATH}/{mine['id']}").status_code == 403
    assert GatewayKey.objects.get(name="theirs").revoked_at is None


def test_a_viewer_who_is_a_member_reads_all_and_rotates_his_own(
    operator: User, person: Callable[..., User]
) -> None:
    from django.contrib.auth.models import Group

    both = person("bo", "viewer")
    with changes(actor=None, via="system"):
        both.groups.add(Group.objects.get(name="member"))
    theirs = issue(as_(operator), name="theirs")
    mine = issue(as_(operator), name="mine", owner="bo")
    client = as_(both)

    assert client.get(PATH).json()["count"] == 2
    assert client.post(f"{PATH}/{theirs['id']}/rotate").status_code == 404
    assert client.post(f"{PATH}/{mine['id']}/rotate").status_code == 200


def test_a_key_made_without_a_word_about_it_runs_fifty_requests_at_once(operator: User) -> None:
    client = as_(operator)
    assert issue(client)["max_concurrency"] == 50
    assert issue(client, name="free", max_concurrency=None)["max_concurrency"] is None
    assert issue(client, name="wide", max_concurrency=500)["max_concurrency"] == 500


def test_how_many_at_once_a_new_key_runs_is_a_setting(owner: User, settings: LazySettings) -> None:
    client = as_(owner)
    settings.DEFAULT_MAX_CONCURRENCY = 7
    made = issue(client)
    assert made["max_concurrency"] == 7
    settings.DEFAULT_MAX_CONCURRENCY = 0
    assert issue(client, name="free")["max_concurrency"] is None
    path = f"{PATH}/{made['id']}"
    assert client.patch(path, {"max_concurrency": None}).json()["max_concurrency"] is None
    assert client.put(path, {"name": "app"}).json()["max_concurrency"] is None


def test_whether_streams_are_resumed_is_said_here_and_reaches_requests(owner: User) -> None:
    client = as_(owner)
    made = issue(client)
    path = f"{PATH}/{made['id']}"
    key_id = GatewayKey.objects.get().key_id
    assert (made["resume_streams"], build().callers[key_id].resume) == (None, None)

    for switch in (False, True, None):
        assert client.patch(path, {"resume_streams": switch}).json()["resume_streams"] is switch
        assert build().callers[key_id].resume is switch


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""), ("name", None), ("owner", "nobody"), ("owner", True), ("owner", 10**30), ("requests_per_minute", 0),
        ("requests_per_minute", "many"), ("tokens_per_minute", 10**12), ("allowed_models", "gpt"), ("allowed_models", [1]),
        ("allowed_networks", ["300.1.1.1"]), ("expires_at", "tomorrow"), ("key", "pen_live_x"), ("last4", "abcd"), ("colour", 1),
        ("resume_streams", "perhaps"), ("resume_streams", []), ("allowed_networks", [3232235521]), ("allowed_networks", [True]),
        ("allowed_networks", ["10.0.0.0/8", 5]),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(operator: User, field: str, value: object) -> None:
    response = as_(operator).post(PATH, {"name": "app", field: value})

    assert response.status_code == 400, response.content
    assert set(error(response)["details"]) == {field}
    assert not GatewayKey.objects.exists()


def test_a_list_page_takes_few_queries_however_many_rows_it_has(operator: User, viewer: User) -> None:
    with changes(actor=None, via="system"):
        for number in range(30):
            key = GatewayKey(name=f"k{number}", owner=operator)
            keys.give_secret(key)
            key.save()
    client = as_(viewer)
    with CaptureQueriesContext(connection) as queries:
        assert client.get(f"{PATH}?page_size=200").json()["count"] == 30
    assert len(queries) <= 12, [query["sql"] for query in queries]
