"""The order in which a route's nodes are tried, without a gateway around it."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable

import pytest

from proxy.strategies import Node, Option, Route, RouteState, Speeds, Wheel, matches, why

pytestmark = pytest.mark.no_database

REQUESTS = 10_000


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def route_of(*nodes: Node, mode: str = "auto", strategy: str = "round-robin") -> Route:
    return Route(7, "fast", mode, strategy, nodes)


def state_of(seed: int = 1, clock: Clock | None = None) -> RouteState:
    return RouteState(chance=random.Random(seed).randrange, clock=clock or Clock())


def options_of(route: Route) -> list[Option]:
    return [Option(node, model) for node in route.nodes for model in node.models or ("m",)]


def order(
    state: RouteState, route: Route, hint: str = "", avoid: Iterable[int] = (), peek: bool = False
) -> list[int]:
    """The providers of the options, in order."""
    options = options_of(route)
    found = state.order(route, options, hint=hint, avoid=frozenset(avoid), peek=peek)
    assert sorted(each.index for each in found) == list(range(len(options)))
    return [options[each.index].node.provider_id for each in found]


def first(state: RouteState, route: Route, **how: Iterable[int]) -> int:
    return order(state, route, **how)[0]  # type: ignore[arg-type]  # only `avoid` comes through here


def shares(state: RouteState, route: Route, **how: Iterable[int]) -> Counter[int]:
    return Counter(first(state, route, **how) for _ in range(REQUESTS))


THREE = (Node(1, 10), Node(2, 20), Node(3, 30))


# -- taking turns ------------------------------------------------------------------------------------------------------


def test_round_robin_goes_round() -> None:
    state, route = state_of(), route_of(*THREE)
    seen = [first(state, route) for _ in range(9)]
    assert seen[:3] == seen[3:6] == seen[6:9]
    assert sorted(seen[:3]) == [10, 20, 30]


def test_those_behind_the_first_follow_as_fallbacks() -> None:
    state, route = state_of(), route_of(*THREE)
    for _ in range(5):
        assert sorted(order(state, route)) == [10, 20, 30]


def test_a_process_begins_anywhere_in_the_round() -> None:
    route = route_of(*THREE)
    assert {first(state_of(seed), route) for seed in range(50)} == {10, 20, 30}


@pytest.mark.parametrize("seed", range(5))
def test_weights_are_kept_within_two_percent_over_ten_thousand_requests(seed: int) -> None:
    weights = {10: 5, 20: 3, 30: 1, 40: 1}
    route = route_of(*(Node(i, i, weight=w) for i, w in weights.items()), strategy="weighted")
    counted = shares(state_of(seed), route)
    for provider, weight in weights.items():
        assert abs(counted[provider] - REQUESTS * weight / 10) <= 0.02 * REQUESTS * weight / 10


def test_round_robin_shares_evenly_whatever_the_weights_are() -> None:
    route = route_of(Node(1, 10, weight=9), Node(2, 20, weight=1))
    assert shares(state_of(), route) == {10: REQUESTS / 2, 20: REQUESTS / 2}


def test_weights_are_smooth_and_not_in_bursts() -> None:
    wheel = Wheel()
    assert [wheel.turn({1: 5, 2: 1, 3: 1}) for _ in range(7)] == [1, 1, 2, 1, 3, 1, 1]


def test_weight_nothing_is_only_ever_a_fallback() -> None:
    route = route_of(Node(1, 10, weight=0), Node(2, 20), Node(3, 30), strategy="weighted")
    state = state_of()
    assert all(order(state, route)[2] == 10 for _ in range(100))
    assert first(state, route, avoid=[20, 30]) == 10


def test_the_load_of_one_that_is_down_is_shared_by_all_others() -> None:
    counted = shares(state_of(), route_of(*THREE), avoid=[10])
    assert counted == {20: REQUESTS / 2, 30: REQUESTS / 2}


def test_one_that_is_down_comes_last_and_is_not_forgotten() -> None:
    assert order(state_of(), route_of(*THREE), avoid=[10, 30])[0] == 20
    assert set(order(state_of(), route_of(*THREE), avoid=[10, 30])[1:]) == {10, 30}


def test_one_that_comes_back_gets_its_share_and_no_more() -> None:
    state, route = state_of(), route_of(*THREE)
    for _ in range(1000):
        order(state, route, avoid=[10])
    assert abs(Counter(first(state, route) for _ in range(30))[10] - 10) <= 1


def test_a_look_takes_nobodys_turn() -> None:
    state, route = state_of(), route_of(*THREE, strategy="weighted")
    looked = order(state, route, peek=True)
    described = state.describe(route)
    assert order(state, route, peek=True) == looked
    assert state.describe(route) == described
    assert order(state, route) == looked
    assert order(state, route, peek=True) != looked


def test_other_nodes_start_anew_and_another_name_does_not() -> None:
    state, route = state_of(), route_of(*THREE)
    first(state, route)
    before = state.describe(route)["state"]
    renamed = Route(7, "quick", "auto", "round-robin", route.nodes, resume=False)
    assert state.describe(renamed)["state"] == before
    indices = set()
    for count in range(30):
        changed = route_of(*THREE, Node(4, 40, weight=count))
        indices.add(state.describe(changed)["state"]["round_robin_indices"]["7"])
    assert len(indices) > 1


# -- strategies --------------------------------------------------------------------------------------------------------


def test_failover_keeps_the_order_of_the_nodes() -> None:
    state, route = state_of(), route_of(*THREE, strategy="failover")
    assert [order(state, route) for _ in range(3)] == [[10, 20, 30]] * 3
    assert order(state, route, avoid=[10]) == [20, 30, 10]


def test_least_busy_goes_where_fewest_requests_run_and_takes_turns_among_equals() -> None:
    state, route = state_of(), route_of(*THREE, strategy="least-busy")
    state.began(10)
    state.began(10)
    state.began(20)
    assert order(state, route) == [30, 20, 10]
    state.began(30)
    assert {first(state, route) for _ in range(4)} == {20, 30}
    for provider in (10, 10, 20, 30):
        state.ended(provider)
    assert {first(state, route) for _ in range(6)} == {10, 20, 30}
    assert not state.in_flight


def test_fastest_prefers_the_shortest_time_to_the_first_token() -> None:
    state, route = state_of(), route_of(*THREE, strategy="fastest")
    for provider, ms in ((10, 300.0), (20, 80.0), (30, 200.0)):
        state.answered(provider, "m", ms)
    assert [order(state, route) for _ in range(12)] == [[20, 30, 10]] * 12


def test_fastest_tries_the_unknown_now_and_then() -> None:
    state, route = state_of(), route_of(*THREE, strategy="fastest")
    state.answered(10, "m", 100)
    counted = Counter(first(state, route) for _ in range(100))
    assert counted == {10: 90, 20: 5, 30: 5}


def test_what_was_fast_long_ago_is_unknown_again() -> None:
    clock = Clock()
    state, route = state_of(clock=clock), route_of(*THREE[:2], strategy="fastest")
    state.answered(10, "m", 5000)
    state.answered(20, "m", 10)
    assert Counter(first(state, route) for _ in range(20)) == {20: 20}
    clock.now += 300
    state.answered(20, "m", 10)
    assert Counter(first(state, route) for _ in range(20)) == {20: 18, 10: 2}


def test_speeds_forget_by_half_each_minute() -> None:
    speeds = Speeds()
    speeds.observe(1, "m", 100, 0.0)
    speeds.observe(1, "m", 400, 60.0)
    assert speeds.of(1, "m", 60.0) == pytest.approx((100 * 0.5 + 400) / 1.5)
    assert speeds.of(1, "m", 10_000.0) is None
    assert speeds.of(1, "other", 60.0) is None


def test_cheapest_goes_by_what_the_node_says_else_by_the_known_price_and_unknown_last() -> None:
    route = route_of(Node(1, 10), Node(2, 20, price=0.5), Node(3, 30, price=0.2), strategy="cheapest")
    assert order(state_of(), route) == [30, 20, 10]
    known = {(10, "m"): 0.3, (20, "m"): 0.1}
    options = options_of(route)
    told = state_of().order(route, options, price=lambda provider, model: known.get((provider, model)))
    assert [options[each.index].node.provider_id for each in told] == [30, 10, 20]
    assert why(told[0]) == "$0.2 for a million tokens"


def test_cheapest_knows_the_models_that_a_node_names_apart() -> None:
    node = Node(1, 10, models=("large", "small"))
    prices = {"large": 3.0, "small": 1.0}
    state = state_of()
    route = route_of(node, Node(2, 20, price=2.0), strategy="cheapest")
    options = [Option(node, "large"), Option(node, "small"), Option(route.nodes[1], "m")]
    found = state.order(route, options, price=lambda provider, model: prices.get(model))
    assert [each.index for each in found] == [1, 2, 0]


def test_a_nodes_strategy_overrides_the_routes() -> None:
    nodes = [Node(each.id, each.provider_id, strategy="failover") for each in THREE]
    state, route = state_of(), route_of(*nodes, strategy="round-robin")
    assert [first(state, route) for _ in range(4)] == [10] * 4


def test_the_other_models_of_a_node_come_after_all_nodes() -> None:
    route = route_of(Node(1, 10, ("a", "b")), Node(2, 20, ("c", "d")), strategy="failover")
    assert order(state_of(), route) == [10, 20, 10, 20]


# -- modes -------------------------------------------------------------------------------------------------------------


def test_multi_tries_group_after_group_and_takes_turns_within() -> None:
    nodes = (Node(1, 10, priority=5), Node(2, 20, priority=1), Node(3, 30, priority=1))
    state, route = state_of(), route_of(*nodes, mode="multi")
    seen = [order(state, route) for _ in range(4)]
    assert all(each[2] == 10 for each in seen)
    assert {each[0] for each in seen} == {20, 30}
    assert order(state, route, avoid=[20, 30])[0] == 10
    assert order(state, route, avoid=[20])[:2] == [30, 10]


def test_a_group_that_stands_in_takes_turns_too() -> None:
    nodes = (Node(1, 10), Node(2, 20, priority=1), Node(3, 30, priority=1))
    state, route = state_of(), route_of(*nodes, mode="multi")
    assert Counter(first(state, route, avoid=[10]) for _ in range(10)) == {20: 5, 30: 5}


def test_specific_goes_where_the_hint_leads_and_then_to_the_others_in_order() -> None:
    nodes = (Node(1, 10, ("org/tiny",)), Node(2, 20, ("big",)), Node(3, 30, ("big",)))
    state, route = state_of(), route_of(*nodes, mode="specific")
    assert order(state, route, hint="tiny") == [10, 20, 30]
    assert {tuple(order(state, route, hint="big")) for _ in range(4)} == {(20, 30, 10), (30, 20, 10)}
    assert [first(state, route) for _ in range(3)] == [10] * 3


def test_a_hint_is_a_models_name_or_its_last_part() -> None:
    assert matches("meta/llama", "llama") and matches("meta/llama", "meta/llama")
    assert not matches("meta/llama", "meta") and not matches("llama", "lla")


def test_a_route_without_nodes_has_no_order() -> None:
    for mode in ("auto", "specific", "multi"):
        assert state_of().order(route_of(mode=mode), []) == []
        assert state_of().describe(route_of(mode=mode))["state"]["round_robin_indices"] == {}


def test_the_state_names_the_next_place_of_each_group() -> None:
    state, route = state_of(), route_of(*THREE)
    for _ in range(5):
        expected = state.describe(route)["state"]["round_robin_indices"]["7"]
        assert first(state, route) == THREE[expected].provider_id
    nodes = (Node(1, 10), Node(2, 20, priority=3))
    told = state.describe(Route(8, "two", "multi", "weighted", nodes))
    assert (told["route_id"], told["route_name"]) == (8, "two")
    assert told["state"]["round_robin_indices"] == {"0": 0, "3": 0}


def test_the_reasons_are_words() -> None:
    state = state_of()
    state.answered(10, "m", 42)
    said = {
        strategy: [
            why(each) for each in state.order(route_of(*THREE[:2], strategy=strategy), options_of(route_of(*THREE[:2])))
        ]
        for strategy in ("round-robin", "failover", "weighted", "least-busy", "fastest", "cheapest")
    }  # fmt: skip
    assert said["round-robin"][0] == "by turns"
    assert said["failover"] == ["in order, place 1", "in order, place 2"]
    assert said["least-busy"][0] == "0 requests in flight"
    assert "42 ms to the first token" in said["fastest"]
    assert said["cheapest"][0] == "price not known"
