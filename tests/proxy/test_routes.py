"""Model routes on the data plane: which provider answers, and who may ask."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from proxy import selection
from proxy.auth import Caller
from proxy.candidates import Conditions
from proxy.errors import ContextTooLong, InvalidRequest, ModelNotAllowed
from proxy.needs import Needs, needs_of
from proxy.selection import Plan
from proxy.strategies import Node, RouteState
from tests.support.answers import status
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

ANYBODY = Caller(1, "k", "app", "", "", 1)


def plan_of(
    house: House, model: str, *, purpose: str = "chat", needs: Needs | None = None, **how: Any
) -> Plan:
    caller = how.pop("caller", ANYBODY)
    conditions = Conditions(house.watcher.weather, how.pop("open_circuits", {}))
    return selection.plan(
        house.watcher.snapshot,
        conditions,
        caller,
        purpose=purpose,
        model=model,
        provider_id="",
        needs=lambda: needs or Needs(),
        routes=how.pop("routes", RouteState()),
    )


def names(plan: Plan) -> list[str]:
    return [candidate.full_name for candidate in plan.candidates]


# -- through the whole data plane ----------------------------------------------------------------------------------------


def test_a_route_shares_requests_among_its_nodes_and_says_so(pair: House) -> None:
    pair.route("fast", 1, 2)
    answers = [pair.ask("fast") for _ in range(6)]
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-penstock-route"] for answer in answers} == {"route:fast"}
    assert Counter(answer.headers["x-penstock-provider"] for answer in answers) == {"first": 3, "second": 3}
    assert {record["status"] for record in pair.records(6)} == {"success"}


def test_a_node_that_fails_is_replaced_by_the_next(pair: House, upstream: Upstream) -> None:
    pair.route("steady", 1, 2, strategy="failover")
    upstream.behave(status(500))
    answer = pair.ask("steady")
    assert answer.headers["x-penstock-provider"] == "second"
    assert answer.headers["x-penstock-attempts"] == "2"


def test_rule_2_comes_before_slugs_and_the_catalogue_and_after_the_provider_id(pair: House) -> None:
    pair.route("tiny", 2)
    assert pair.ask("tiny").headers["x-penstock-route"] == "route:tiny"
    assert pair.ask("tiny", provider_id=1).headers["x-penstock-route"] == "provider_id"
    assert pair.ask("first/tiny").headers["x-penstock-route"] == "provider:first"


def test_a_hint_after_the_name_selects_in_mode_specific_only(pair: House) -> None:
    pair.route("pick", 1, 2, mode="specific")
    assert pair.ask("pick/big").headers["x-penstock-model"] == "big"
    assert pair.ask("pick").headers["x-penstock-model"] == "tiny"
    answer = pair.ask("pick/unheard-of")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    pair.route("turns", 1, 2)
    assert pair.ask("turns/big").status_code == 404


def test_a_key_for_the_route_reaches_all_of_its_nodes_and_nothing_else(
    pair: House, upstream: Upstream
) -> None:
    pair.route("fast", 1, 2, strategy="failover")
    key = pair.issue("narrow", allowed_models=("fast",))
    assert pair.ask("fast", key=key).headers["x-penstock-provider"] == "first"
    upstream.behave(status(503))
    assert pair.ask("fast", key=key).headers["x-penstock-provider"] == "second"
    assert pair.ask("second/big", key=key).json()["error"]["code"] == "model_not_allowed"


def test_routes_are_listed_for_those_who_may_call_them(pair: House) -> None:
    import httpx

    def listed(key: str, id: str = "") -> Any:
        headers = {"Authorization": f"Bearer {key}"}
        return httpx.get(f"{pair.url}/v1/models{id}", headers=headers).json()

    pair.route("fast", 1, 2)
    pair.route("tiny", 2)
    owners = [(each["id"], each["owned_by"]) for each in listed(pair.key)["data"]]
    assert owners[:2] == [("fast", "penstock"), ("tiny", "penstock")]
    assert len(owners) == len({id for id, _ in owners})
    assert listed(pair.key, "/fast")["owned_by"] == "penstock"
    narrow = listed(pair.issue("narrow", allowed_models=("fa*",)))["data"]
    assert [each["id"] for each in narrow] == ["fast"]


# -- in detail -----------------------------------------------------------------------------------------------------------


def test_ten_thousand_requests_are_shared_by_weight(pair: House) -> None:
    pair.route("fast", Node(1, 1, weight=3), Node(2, 2, weight=1), strategy="weighted")
    routes = RouteState()
    counted = Counter(names(plan_of(pair, "fast", routes=routes))[0] for _ in range(10_000))
    assert abs(counted["first/tiny"] - 7500) <= 150


def test_a_node_that_is_down_is_left_out_and_all_down_is_a_forced_trial(pair: House) -> None:
    pair.route("fast", 1, 2)
    pair.weather(down={1: "timeout"})
    for _ in range(4):
        assert names(plan_of(pair, "fast")) == ["second/big"]
    plan = plan_of(pair, "fast", open_circuits={2: 9.0})
    assert len(plan.candidates) == 1 and plan.trace[-1] == f"{names(plan)[0]}: forced trial"
    pair.weather(down={1: "timeout", 2: "timeout"})
    assert len(plan_of(pair, "fast").candidates) == 1


def test_a_key_without_the_routes_name_must_be_for_each_of_its_models(pair: House) -> None:
    pair.route("fast", 1, 2)
    one = Caller(1, "k", "app", "", "", 1, allowed_models=("first/*",))
    both = Caller(1, "k", "app", "", "", 1, allowed_models=("first/*", "second/big"))
    for _ in range(4):
        with pytest.raises(ModelNotAllowed):
            plan_of(pair, "fast", caller=one)
        assert len(plan_of(pair, "fast", caller=both).candidates) == 2


def test_a_disabled_provider_takes_no_turns(pair: House) -> None:
    pair.route("fast", 1, 2, 77)
    routes = RouteState()
    counted = Counter(names(plan_of(pair, "fast", routes=routes))[0] for _ in range(100))
    assert abs(counted["first/tiny"] - counted["second/big"]) <= 2


def test_a_node_names_its_models_or_stands_for_those_of_its_provider(pair: House, upstream: Upstream) -> None:
    many = pair.provide("many", f"{upstream.url}/v1", models=("a", "b", "embed"))
    pair.know(many, "embed", purposes=frozenset({"embeddings"}))
    pair.route("named", Node(1, many, ("b", "unlisted")), strategy="failover")
    pair.route("open", many, strategy="failover")
    assert names(plan_of(pair, "named")) == ["many/b", "many/unlisted"]
    assert names(plan_of(pair, "open")) == ["many/a", "many/b"]


def test_a_hint_is_sought_among_all_models_of_a_provider(house: House, upstream: Upstream) -> None:
    house.provide("many", f"{upstream.url}/v1", models=tuple(f"m{n}" for n in range(100)))
    house.route("pick", 1, mode="specific")
    assert names(plan_of(house, "pick/m77"))[0] == "many/m77"
    assert names(plan_of(house, "pick")) == ["many/m0", "many/m1"]


def test_of_a_node_that_names_no_models_one_that_fits_is_found(house: House, upstream: Upstream) -> None:
    house.provide("many", f"{upstream.url}/v1", models=tuple(f"m{n}" for n in range(10)))
    for number in range(9):
        house.know(1, f"m{number}", context_window=10)
    house.route("open", 1)
    assert names(plan_of(house, "open", needs=Needs(prompt_bytes=1000))) == ["many/m9"]


def test_a_prompt_goes_only_where_it_may_fit(pair: House) -> None:
    pair.route("fast", 1, 2, strategy="failover")
    pair.know(1, "tiny", context_window=100)
    plan = plan_of(pair, "fast", needs=Needs(prompt_bytes=2000))
    assert names(plan) == ["second/big"]
    assert plan.trace[0] == "first/tiny: cannot: at least 250 tokens, and its window has 100"
    assert names(plan_of(pair, "fast", needs=Needs(prompt_bytes=700)))[0] == "first/tiny"
    pair.know(2, "big", context_window=200)
    with pytest.raises(ContextTooLong) as refused:
        plan_of(pair, "fast", needs=Needs(prompt_bytes=2000))
    assert (refused.value.status, refused.value.code) == (400, "context_length_exceeded")


def test_tools_and_images_go_only_where_they_are_taken(pair: House) -> None:
    pair.route("fast", 1, 2, strategy="failover")
    pair.know(1, "tiny", capabilities=frozenset({"function_calling"}))
    body = {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    assert names(plan_of(pair, "fast", needs=needs_of(body))) == ["second/big"]
    pair.know(2, "big", capabilities=frozenset({"tools"}))
    with pytest.raises(InvalidRequest, match="images"):
        plan_of(pair, "fast", needs=needs_of(body))


def test_those_left_out_by_a_need_take_no_turns(pair: House, upstream: Upstream) -> None:
    pair.provide("third", f"{upstream.url}/v1", models=("third",))
    pair.route("fast", 1, 2, 3)
    pair.know(1, "tiny", context_window=10)
    routes, needs = RouteState(), Needs(prompt_bytes=1000)
    counted = Counter(names(plan_of(pair, "fast", routes=routes, needs=needs))[0] for _ in range(100))
    assert counted["first/tiny"] == 0
    assert abs(counted["second/big"] - counted["third/third"]) <= 2


def test_embeddings_never_change_their_length(house: House, upstream: Upstream) -> None:
    for slug, dimensions in (("one", 384), ("two", 1024), ("three", 384)):
        number = house.provide(slug, f"{upstream.url}/v1", models=(slug,), purposes=frozenset({"embeddings"}))
        house.know(number, slug, dimensions=dimensions)
    house.route("vectors", 1, 2, 3)
    for _ in range(6):
        plan = plan_of(house, "vectors", purpose="embeddings")
        assert sorted(names(plan)) == ["one/one", "three/three"]
        assert plan.trace[0] == "two/two: makes vectors of another length"


def test_what_a_name_meant_a_moment_ago_is_no_answer_for_another_key_request_or_weather(pair: House) -> None:
    """What was worked out is kept while configuration stays the same; all that does not follow from it is asked each time."""
    pair.activate((1, "tiny"), (2, "big"))
    assert names(plan_of(pair, "")) == ["first/tiny", "second/big"]
    assert plan_of(pair, "") is plan_of(pair, "")
    assert names(plan_of(pair, "", open_circuits={1: 9.0})) == ["second/big"]
    pair.weather(down={1: "timeout"})
    assert names(plan_of(pair, "")) == ["second/big"]
    pair.weather(down={})
    with pytest.raises(ModelNotAllowed):
        plan_of(pair, "tiny", caller=Caller(1, "k", "app", "", "", 1, allowed_models=("big",)))
    pair.know(1, "tiny", context_window=10)
    assert names(plan_of(pair, "")) == ["first/tiny", "second/big"]
    assert names(plan_of(pair, "", needs=Needs(prompt_bytes=1000))) == ["second/big"]


def test_names_that_callers_make_up_are_forgotten_again(pair: House) -> None:
    for number in range(3000):
        plan_of(pair, f"first/{number}")
    assert len(pair.watcher.snapshot.standings) <= selection.MOST_STANDINGS


def test_configuration_says_whether_a_broken_stream_is_resumed(pair: House) -> None:
    pair.route("fast", 1, 2)
    pair.route("strict", 1, 2, resume=False)
    assert plan_of(pair, "fast").resume
    assert not plan_of(pair, "strict").resume
    assert plan_of(pair, "").resume
    assert not plan_of(pair, "tiny").resume
    pair.activate((1, "tiny"))
    assert not plan_of(pair, "").resume
