"""Model routes through the API."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import IntegrityError, transaction
from rest_framework.test import APIClient

from audit.changes import changes
from audit.models import Entry
from providers.health import set_override
from providers.models import Provider
from proxy import dry_run
from proxy.models import ModelRoute, RouteNode
from proxy.snapshot import build
from tests.support.api import V1, add_server, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/model-routes"


@pytest.fixture
def servers(operator: User) -> list[int]:
    """Two servers with a model each."""
    client = as_(operator)
    return [
        add_server(client, name=name, models=[model])["id"]
        for name, model in (("one", "tiny"), ("two", "big"))
    ]


def add_route(client: APIClient, *nodes: Any, **fields: Any) -> dict[str, Any]:
    body = {
        "name": "fast",
        "nodes": [{"provider_id": n} if isinstance(n, int) else n for n in nodes],
        **fields,
    }
    response = client.post(PATH, body)
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def one(route: dict[str, Any]) -> str:
    return f"{PATH}/{route['id']}"


# -- reading and writing -------------------------------------------------------------------------------------------------


def test_a_route_is_made_with_its_nodes_under_either_name(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    node = {"models": [], "strategy": "round-robin", "priority": 0, "metadata": {}}
    made = add_route(
        client, {"api_id": servers[0], **node}, {"provider_id": servers[1]}, mode="auto", config={}
    )

    assert (made["name"], made["mode"], made["strategy"]) == ("fast", "auto", "round-robin")
    assert (made["is_active"], made["resume"], made["created_by"]) == (True, None, "operator")
    first, second = made["nodes"]
    assert first == {**node, "id": first["id"], "api_id": servers[0], "provider_id": servers[0], "weight": 1}
    assert second["strategy"] == ""
    assert client.get(one(made)).json() == made


def test_one_entry_tells_of_the_route_and_its_nodes(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers)
    client.patch(one(made), {"nodes": [{"provider_id": servers[0], "weight": 3}]})
    client.delete(one(made))

    entries = list(Entry.objects.filter(entity_type="model_route").order_by("seq"))
    assert [entry.action for entry in entries] == [
        "add_model_route", "update_model_route", "delete_model_route",
    ]  # fmt: skip
    assert {entry.entity_id for entry in entries} == {str(made["id"])}
    assert entries[0].changes["nodes.1.provider"] == [None, servers[1]]
    assert entries[1].changes["nodes.0.weight"] == [1, 3]
    assert entries[1].changes["nodes.1.provider"] == [servers[1], None]


def test_a_change_of_the_nodes_is_a_new_version_and_none_is_not(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers)
    tag = client.get(one(made))["ETag"]

    assert client.patch(one(made), {"nodes": made["nodes"]})["ETag"] == tag
    assert client.put(one(made), client.get(one(made)).json())["ETag"] == tag
    changed = client.patch(one(made), {"nodes": [{"provider_id": servers[1]}]})
    assert changed["ETag"] != tag
    for response in (
        client.patch(one(made), {"name": "late"}, headers={"If-Match": tag}),
        client.delete(one(made), headers={"If-Match": tag}),
    ):
        assert response.status_code == 412


def test_of_a_node_that_was_read_and_edited_the_edited_name_wins(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, servers[0])
    node = made["nodes"][0]

    moved = client.patch(one(made), {"nodes": [{**node, "api_id": servers[1]}]}).json()
    assert moved["nodes"][0]["provider_id"] == servers[1]
    back = client.patch(one(made), {"nodes": [{**moved["nodes"][0], "provider_id": servers[0]}]}).json()
    assert back["nodes"][0]["api_id"] == servers[0]
    response = client.patch(one(made), {"nodes": [{"provider_id": servers[0], "api_id": servers[1]}]})
    assert error(response)["details"].keys() == {"nodes.0.api_id"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "a/b"}, "name"), ({"name": "auto"}, "name"), ({"name": "Default"}, "name"), ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"), ({"name": "x" * 129}, "name"), ({"mode": "any"}, "mode"), ({"strategy": "best"}, "strategy"),
        ({"colour": 1}, "colour"), ({"config": []}, "config"), ({"nodes": {}}, "nodes.non_field_errors"), ({"nodes": [{}]}, "nodes.0.provider_id"),
        ({"nodes": [{"provider_id": 999}]}, "nodes.0.provider_id"), ({"nodes": [{"api_id": "x"}]}, "nodes.0.provider_id"),
        ({"nodes": [{"provider_id": 1, "colour": 1}]}, "nodes.0.colour"), ({"nodes": [{"provider_id": 1, "weight": -1}]}, "nodes.0.weight"),
        ({"nodes": [{"provider_id": 1, "models": ["a", "a"]}]}, "nodes.0.models"), ({"nodes": [{"provider_id": 1, "models": [""]}]}, "nodes.0.models.0"),
        ({"nodes": [{"provider_id": 1, "strategy": "best"}]}, "nodes.0.strategy"), ({"nodes": [{"provider_id": 1, "priority": 2**40}]}, "nodes.0.priority"),
        ({"nodes": [{"provider_id": 1, "metadata": []}]}, "nodes.0.metadata"), ({"nodes": [{"provider_id": 1}] * 51}, "nodes"),
        ({"id": 77}, "id"), ({"resume": "perhaps"}, "resume"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(operator: User, change: dict[str, Any], field: str) -> None:
    response = as_(operator).post(PATH, {"name": "fast", **change})

    assert response.status_code == 400, response.content
    assert set(error(response)["details"]) == {field}
    assert not ModelRoute.objects.exists()


def test_names_are_unique_and_never_hide_the_models_of_a_provider(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    add_route(client)
    assert error(client.post(PATH, {"name": "fast"}))["details"].keys() == {"name"}
    hiding = client.post(PATH, {"name": "one", "mode": "specific"})
    assert error(hiding)["details"].keys() == {"name"}
    assert client.post(PATH, {"name": "one", "mode": "auto"}).status_code == 201


def test_lists_are_filtered_searched_and_paged(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    add_route(client, servers[0], {"provider_id": servers[0], "models": ["x"]})
    add_route(client, servers[1], name="slow", mode="multi", is_active=False)

    def found(query: str) -> list[str]:
        return [each["name"] for each in client.get(f"{PATH}?{query}").json()["results"]]

    assert found("") == ["fast", "slow"]
    assert found("ordering=-name") == ["slow", "fast"]
    assert found("search=slo") == found("mode=multi") == found("is_active=false") == ["slow"]
    assert found(f"provider={servers[0]}") == ["fast"]
    assert client.get(f"{PATH}?page_size=1").json()["count"] == 2


@pytest.mark.parametrize("provider", ["99999999999999999999999", "-99999999999999999999999", "one", "NaN"])
def test_a_provider_that_cannot_be_is_no_filter(operator: User, provider: str) -> None:
    response = as_(operator).get(PATH, {"provider": provider})
    assert response.status_code == 400
    assert set(error(response)["details"]) == {"provider"}


def test_a_provider_in_a_route_is_not_deleted(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers)

    response = client.delete(f"{V1}/servers/{servers[1]}")

    assert response.status_code == 409
    place = {"type": "model_route", "id": str(made["id"]), "name": "fast"}
    assert error(response)["details"]["used_by"] == [place]
    client.delete(one(made))
    assert client.delete(f"{V1}/servers/{servers[1]}").status_code == 204


@pytest.mark.parametrize(
    "columns",
    [{"name": "a/b"}, {"name": "auto"}, {"name": ""}, {"mode": "x"}, {"strategy": ""}],
)
def test_the_database_refuses_what_the_forms_refuse(columns: dict[str, str]) -> None:
    with pytest.raises(IntegrityError), transaction.atomic(), changes(actor=None, via="system"):
        ModelRoute.objects.create(**{"name": "fast", **columns})


def test_the_database_refuses_two_nodes_at_one_place_and_unknown_strategies(servers: list[int]) -> None:
    with changes(actor=None, via="system"):
        route = ModelRoute.objects.create(name="fast")
        RouteNode.objects.create(route=route, position=0, provider_id=servers[0])
        for columns in ({"position": 0}, {"position": 1, "strategy": "x"}):
            with pytest.raises(IntegrityError), transaction.atomic():
                RouteNode.objects.create(route=route, provider_id=servers[0], **columns)


# -- the snapshot --------------------------------------------------------------------------------------------------------


def test_requests_see_active_routes_and_what_is_known_of_models(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    known = {
        "id": "tiny",
        "context_window": 100,
        "dimensions": 3,
        "capabilities": ["tools"],
        "purposes": ["chat"],
    }
    client.patch(f"{V1}/servers/{servers[0]}", {"models": [known]})
    node = {
        "provider_id": servers[0],
        "models": ["tiny"],
        "weight": 4,
        "priority": 2,
        "metadata": {"price": 0.5},
    }
    add_route(client, node, servers[1], strategy="weighted", resume=False)
    add_route(client, name="off", is_active=False)

    snapshot = build()

    assert list(snapshot.routes) == ["fast"]
    route = snapshot.routes["fast"]
    assert (route.mode, route.strategy, route.resume) == ("auto", "weighted", False)
    first = route.nodes[0]
    assert (first.provider_id, first.models, first.weight, first.priority, first.price) == (
        servers[0], ("tiny",), 4, 2, 0.5,
    )  # fmt: skip
    facts = snapshot.facts_of(servers[0], "tiny")
    assert (facts.context_window, facts.dimensions) == (100, 3)
    assert (facts.capabilities, facts.purposes) == (frozenset({"tools"}), frozenset({"chat"}))


# -- asking --------------------------------------------------------------------------------------------------------------


def test_select_takes_a_turn_and_a_dry_run_does_not(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers)

    def selected(query: str = "") -> Any:
        return client.post(f"{one(made)}/select{query}", {}).json()

    def state() -> Any:
        return client.get(f"{one(made)}/state").json()

    before = state()
    looked = [selected("?dry_run=true")["provider_id"] for _ in range(3)]
    assert len(set(looked)) == 1
    assert state() == before
    taken = [selected()["provider_id"] for _ in range(4)]
    assert taken == [looked[0], *(set(servers) - {looked[0]}), looked[0], *(set(servers) - {looked[0]})]
    assert (before["route_id"], before["route_name"]) == (made["id"], "fast")
    assert before["state"]["round_robin_indices"] == {str(made["id"]): servers.index(looked[0])}


def test_select_says_where_and_why(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers, strategy="failover")
    with changes(actor=operator, via="api"):
        set_override(Provider.objects.get(pk=servers[0]), False)

    answer = client.post(f"{one(made)}/select", {"model": "tiny"}).json()

    assert (answer["provider_id"], answer["provider_name"], answer["model"]) == (servers[1], "two", "big")
    assert answer["why"][0] == "route fast: auto, failover"
    assert any(line.startswith("two/big: in order") for line in answer["why"])


def test_a_hint_selects_in_mode_specific(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers, mode="specific")

    assert client.post(f"{one(made)}/select", {"model": "big"}).json()["model"] == "big"
    assert client.post(f"{one(made)}/select", {}).json()["model"] == "tiny"
    response = client.post(f"{one(made)}/select", {"model": "unheard-of"})
    assert response.status_code == 400
    assert error(response)["details"].keys() == {"model"}


def test_when_all_are_unhealthy_the_answer_is_503(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    made = add_route(client, *servers)
    for number in servers:
        client.patch(f"{V1}/providers/{number}/health", {"is_healthy": False})

    response = client.post(f"{one(made)}/select", {})

    assert response.status_code == 503
    assert error(response)["code"] == "SERVICE_UNAVAILABLE"
    assert response["Retry-After"]
    client.patch(f"{V1}/providers/{servers[1]}/health", {"is_healthy": True})
    assert client.post(f"{one(made)}/select", {}).json()["provider_id"] == servers[1]


def test_a_route_that_is_off_or_leads_nowhere_selects_nothing(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    off = add_route(client, *servers, name="off", is_active=False)
    empty = add_route(client, name="empty")

    assert client.post(f"{one(off)}/select", {}).status_code == 409
    assert client.post(f"{one(empty)}/select", {}).status_code == 503
    assert client.post(f"{one(empty)}/select", {"colour": 1}).status_code == 400
    assert client.get(f"{one(empty)}/state").json()["state"]["round_robin_indices"] == {}


def test_a_dry_run_tells_of_nodes_that_cannot_be_meant(operator: User, servers: list[int]) -> None:
    client = as_(operator)
    bare = add_server(client, name="bare")["id"]
    made = add_route(client, servers[0], servers[1], bare)
    client.patch(f"{V1}/servers/{servers[1]}", {"enabled": False})

    result = dry_run.run(ModelRoute.objects.get(pk=made["id"]))

    assert [step.slug for step in result.steps] == ["one"]
    assert result.notes == ("two: the provider is disabled", "bare: no model for chat is known")


def test_a_client_of_another_system_is_answered_in_its_shape(operator: User, servers: list[int]) -> None:
    """The other mount, and a node's strategy where the route names none."""
    client = as_(operator)
    node = {"models": [], "strategy": "failover", "priority": 0, "metadata": {}}
    body = {
        "name": "llm",
        "mode": "auto",
        "is_active": True,
        "config": {},
        "nodes": [{"api_id": n, **node} for n in servers],
    }
    made = client.post("/api/model-routes", body).json()

    for _ in range(2):
        answer = client.post(f"/api/model-routes/{made['id']}/select", {}).json()
        assert {"provider_id": servers[0], "provider_name": "one", "model": "tiny"}.items() <= answer.items()
    told = client.get(f"/api/model-routes/{made['id']}/state").json()
    assert told.keys() == {"route_id", "route_name", "state"}
