"""Several rows at once: all of them, or none, and one entry for each."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User

from audit.models import Entry
from providers.models import ApiKey, Provider
from proxy.models import GatewayKey, ModelRoute
from tests.support.api import V1, add_key, add_server, as_, error

pytestmark = pytest.mark.django_db


def bulk(client: Any, what: str, action: str, ids: list[Any]) -> Any:
    return client.post(f"{V1}/{what}/bulk", {"action": action, "ids": ids})


@pytest.mark.parametrize("what", ["servers", "providers"])
def test_servers_are_disabled_enabled_and_deleted_with_one_entry_each(operator: User, what: str) -> None:
    client = as_(operator)
    ids = [add_server(client, name=f"box {n}")["id"] for n in range(3)]
    before = Entry.objects.count()

    answer = bulk(client, what, "disable", ids)

    assert (answer.status_code, answer.json()) == (200, {"action": "disable", "ids": ids})
    assert set(Provider.objects.filter(pk__in=ids).values_list("enabled", flat=True)) == {False}
    assert [e.action for e in Entry.objects.order_by("seq")[before:]] == ["update_server"] * 3
    assert bulk(client, what, "enable", ids[:1]).status_code == 200
    assert Provider.objects.get(pk=ids[0]).enabled
    assert bulk(client, what, "delete", ids).status_code == 200
    assert not Provider.objects.filter(pk__in=ids).exists()
    assert Entry.objects.filter(action="delete_server").count() == 3


def test_keys_routes_and_gateway_keys_too(owner: User) -> None:
    client = as_(owner)
    server, key = add_server(client)["id"], add_key(client)["id"]
    route = client.post(f"{V1}/model-routes", {"name": "r", "nodes": [{"provider_id": server}]}).json()["id"]
    gateway = client.post(f"{V1}/gateway-keys", {"name": "app"}).json()["id"]

    for what, id in (("api-keys", key), ("model-routes", route), ("gateway-keys", gateway)):
        assert bulk(client, what, "disable", [id]).status_code == 200, what

    assert not ApiKey.objects.get(pk=key).enabled
    assert not ModelRoute.objects.get(pk=route).is_active
    assert not GatewayKey.objects.get(pk=gateway).enabled


def test_when_one_is_in_use_none_is_deleted(operator: User) -> None:
    client = as_(operator)
    free, used = add_server(client, name="free")["id"], add_server(client, name="used")["id"]
    client.put(f"{V1}/active/chat", {"provider_type": "ai_server", "provider_id": used})
    before = Entry.objects.count()

    answer = bulk(client, "servers", "delete", [free, used])

    assert answer.status_code == 409
    assert error(answer)["details"]["used_by"][0]["type"] == "active_provider"
    assert Provider.objects.filter(pk__in=[free, used]).count() == 2
    assert Entry.objects.count() == before


@pytest.mark.parametrize(
    ("action", "ids", "field"),
    [
        ("explode", [1], "action"),
        ("enable", [], "ids"),
        ("enable", [999_999], "ids"),
        ("enable", ["x"], "ids.0"),
        ("enable", list(range(1, 502)), "ids"),
    ],
)
def test_a_wrong_request_is_refused(operator: User, action: str, ids: list[Any], field: str) -> None:
    answer = bulk(as_(operator), "servers", action, ids)

    assert answer.status_code == 400
    assert set(error(answer)["details"]) == {field}


def test_a_server_is_only_found_among_servers(operator: User) -> None:
    vendor = Provider.objects.get(slug="openai").pk

    assert bulk(as_(operator), "servers", "enable", [vendor]).status_code == 400
    assert bulk(as_(operator), "providers", "enable", [vendor]).status_code == 200


def test_who_may_not_do_it_to_one_may_not_do_it_to_several(viewer: User, operator: User, owner: User) -> None:
    server, key = add_server(as_(operator))["id"], add_key(as_(owner))["id"]

    assert bulk(as_(viewer), "servers", "disable", [server]).status_code == 403
    assert bulk(as_(operator), "api-keys", "delete", [key]).status_code == 403
    assert bulk(as_(operator), "api-keys", "disable", [key]).status_code == 403
    assert ApiKey.objects.get(pk=key).enabled
