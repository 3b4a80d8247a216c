"""The pages of model routes."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry
from providers.health import set_override
from providers.models import Provider, Server, UpstreamModel
from proxy import dry_run
from proxy.models import ModelRoute, RouteNode

pytestmark = pytest.mark.django_db
LIST, ADD = "admin:proxy_modelroute_changelist", "admin:proxy_modelroute_add"


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def servers() -> list[Server]:
    made = []
    with changes(actor=None, via="system"):
        for number, (name, model) in enumerate((("One", "tiny"), ("Two", "big")), start=8000):
            server = Server.objects.create(name=name, kind="vllm", base_url=f"http://localhost:{number}")
            UpstreamModel.objects.create(provider=server, name=model)
            made.append(server)
    return made


def form_of(*nodes: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """What the page sends. `id` of a node: the stored row."""
    stored = [node for node in nodes if "id" in node]
    form = {
        "name": "fast", "mode": "auto", "strategy": "round-robin", "is_active": "on", "resume": "unknown", "config": "{}",
        "nodes-TOTAL_FORMS": len(nodes), "nodes-INITIAL_FORMS": len(stored),
        **fields,
    }  # fmt: skip
    for number, node in enumerate([*stored, *(node for node in nodes if "id" not in node)]):
        values = {
            "place": "",
            "models": "",
            "strategy": "",
            "weight": 1,
            "priority": 0,
            "metadata": "{}",
            **node,
        }
        form.update({f"nodes-{number}-{name}": value for name, value in values.items()})
    return form


def change(route: ModelRoute) -> str:
    return reverse("admin:proxy_modelroute_change", args=[route.pk])


def dry(route: ModelRoute) -> str:
    return reverse("admin:proxy_modelroute_dry-run", args=[route.pk])


def made(client: Client, *nodes: dict[str, Any], **fields: Any) -> ModelRoute:
    answer = client.post(reverse(ADD), form_of(*nodes, **fields))
    assert answer.status_code == 302, answer.context["adminform"].form.errors
    return ModelRoute.objects.get(name=fields.get("name", "fast"))


def names_of(route: ModelRoute) -> list[str]:
    return [node.provider.name for node in route.nodes.select_related("provider")]


def test_a_route_is_made_with_its_nodes_in_one_recorded_change(operator: User, servers: list[Server]) -> None:
    one, two = servers
    route = made(
        logged_in(operator),
        {"provider": one.pk, "models": "a\r\nb"},
        {"provider": two.pk, "weight": 3, "place": 1},
    )
    assert names_of(route) == ["Two", "One"]
    assert (route.nodes.all()[0].weight, route.nodes.all()[1].models) == (3, ["a", "b"])
    assert route.created_by == "operator"
    entry = Entry.objects.get(entity_type="model_route")
    assert (entry.action, entry.username, entry.via) == ("add_model_route", "operator", "admin")
    assert entry.changes["nodes.0.weight"] == [None, 3]


@pytest.mark.parametrize(("chosen", "kept"), [("unknown", None), ("true", True), ("false", False)])
def test_whether_a_route_resumes_streams_is_chosen_in_its_form(
    operator: User, servers: list[Server], chosen: str, kept: bool | None
) -> None:
    route = made(logged_in(operator), {"provider": servers[0].pk}, resume=chosen)
    assert route.resume is kept


def test_nodes_change_places_and_go(operator: User, servers: list[Server]) -> None:
    client = logged_in(operator)
    route = made(client, *({"provider": server.pk} for server in servers))
    first, second = (
        {"id": node.pk, "route": route.pk, "provider": node.provider_id} for node in route.nodes.all()
    )

    client.post(change(route), form_of({**first, "place": 2}, {**second, "place": 1}))
    assert names_of(route) == ["Two", "One"]
    client.post(change(route), form_of({**first, "provider": servers[1].pk, "DELETE": "on"}, second))
    assert names_of(route) == ["Two"]


def test_a_wrong_node_is_a_form_error_and_nothing_is_saved(operator: User, servers: list[Server]) -> None:
    wrong = {"provider": servers[0].pk, "models": "a\r\na"}
    answer = logged_in(operator).post(reverse(ADD), form_of(wrong))
    assert answer.status_code == 200
    assert "A model stands there twice." in answer.content.decode()
    assert not ModelRoute.objects.exists()


@pytest.mark.parametrize("typed", ['{"a": NaN}', r'{"a": "\ud800"}', "[]", "[" * 100_000])
def test_what_is_no_json_is_a_form_error_of_a_route_and_of_a_node(
    operator: User, servers: list[Server], typed: str
) -> None:
    client, node = logged_in(operator), {"provider": servers[0].pk}
    route = client.post(reverse(ADD), form_of(node, config=typed))
    assert set(route.context["adminform"].form.errors) == {"config"}
    nodes = client.post(reverse(ADD), form_of({**node, "metadata": typed}))
    assert set(nodes.context["inline_admin_formsets"][0].formset.errors[0]) == {"metadata"}
    assert not ModelRoute.objects.exists()


def test_an_empty_box_is_an_empty_object(operator: User, servers: list[Server]) -> None:
    route = made(logged_in(operator), {"provider": servers[0].pk, "metadata": ""}, config="")
    assert (route.config, route.nodes.get().metadata) == ({}, {})


def test_a_page_that_is_out_of_date_saves_nothing(operator: User, servers: list[Server]) -> None:
    client = logged_in(operator)
    route = made(client, {"provider": servers[0].pk})
    opened = client.get(change(route)).context["adminform"].form["row_version"].value()
    node = route.nodes.get()
    row = {"id": node.pk, "route": route.pk, "provider": node.provider_id}
    client.post(change(route), form_of({**row, "weight": 5}))
    late = client.post(change(route), form_of({**row, "weight": 9}, row_version=opened))
    assert "nothing was saved" in late.content.decode()
    assert RouteNode.objects.get().weight == 5


def test_the_list_says_mode_strategy_nodes_and_state(operator: User, servers: list[Server]) -> None:
    client = logged_in(operator)
    made(client, *({"provider": server.pk} for server in servers))
    with changes(actor=operator, via="admin"):
        set_override(Provider.objects.get(pk=servers[0].pk), False)
    made(client, name="empty")
    made(client, name="off", is_active="")
    page = client.get(reverse(LIST)).content.decode()
    for words in (
        "Auto: one group",
        "Round-robin",
        "One, Two",
        "active, 1 of 2 well",
        "leads nowhere",
        ">off<",
    ):
        assert words in page


def test_a_dry_run_shows_the_order_and_why_and_changes_nothing(
    viewer: User, operator: User, servers: list[Server]
) -> None:
    route = made(logged_in(operator), *({"provider": server.pk} for server in servers), strategy="failover")
    with changes(actor=operator, via="admin"):
        set_override(Provider.objects.get(pk=servers[0].pk), False)
    before = dry_run.state(route)

    page = logged_in(viewer).get(dry(route)).content.decode()

    for words in (
        "taken out by hand",
        "circuit closed",
        "key ready",
        "in order, place",
        "goes here",
        "skipped: down",
    ):
        assert words in page
    assert page.index("Two") < page.index("goes here") < page.index("taken out by hand")
    assert dry_run.state(route) == before


def test_a_dry_run_takes_a_hint(viewer: User, operator: User, servers: list[Server]) -> None:
    route = made(logged_in(operator), *({"provider": server.pk} for server in servers), mode="specific")
    client = logged_in(viewer)
    page = client.get(dry(route), {"model": "big"})
    assert page.context["result"].chosen.model == "big"
    assert "has no model nonsense" in client.get(dry(route), {"model": "nonsense"}).content.decode()


def test_a_dry_run_of_a_route_without_anybody_says_so(viewer: User, operator: User, stranger: User) -> None:
    route = made(logged_in(operator))
    assert "No node can take a request now." in logged_in(viewer).get(dry(route)).content.decode()
    assert logged_in(viewer).get(reverse("admin:proxy_modelroute_dry-run", args=[999])).status_code == 404
    assert logged_in(stranger).get(dry(route)).status_code == 302


def test_a_viewer_looks_and_changes_nothing(viewer: User, operator: User, servers: list[Server]) -> None:
    route = made(logged_in(operator), {"provider": servers[0].pk})
    client = logged_in(viewer)
    assert client.get(change(route)).status_code == 200
    assert client.post(change(route), form_of(name="mine")).status_code == 403
    assert client.post(reverse(ADD), form_of(name="mine")).status_code == 403


def test_a_server_in_a_route_is_not_deleted_and_the_page_says_where(
    owner: User, servers: list[Server]
) -> None:
    client = logged_in(owner)
    route = made(client, {"provider": servers[0].pk})
    answer = client.post(reverse("admin:providers_server_delete", args=[servers[0].pk]), {"post": "yes"})
    assert answer.status_code == 409
    assert "One is a node of the route fast" in answer.content.decode()
    assert change(route) in answer.content.decode()
    assert (
        client.post(reverse("admin:proxy_modelroute_delete", args=[route.pk]), {"post": "yes"}).status_code
        == 302
    )
    assert not RouteNode.objects.exists()
