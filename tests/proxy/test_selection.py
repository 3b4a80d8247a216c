"""Where a request goes, by each rule."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database


def route_of(house: House, model: str | None = None, **body: Any) -> tuple[str, str, str]:
    response = house.ask(model, **body)
    assert response.status_code == 200, response.text
    return (
        response.headers["x-penstock-route"],
        response.headers["x-penstock-provider"],
        response.headers["x-penstock-model"],
    )


def test_rule_1_a_provider_id_in_the_body_by_id_or_slug(pair: House) -> None:
    assert route_of(pair, "anything", provider_id=2) == ("provider_id", "second", "anything")
    assert route_of(pair, "anything", provider_id="2") == ("provider_id", "second", "anything")
    assert route_of(pair, None, provider_id="first") == ("provider_id", "first", "tiny")


def test_rule_3_a_slug_before_the_model(pair: House) -> None:
    assert route_of(pair, "second/org/name") == ("provider:second", "second", "org/name")


def test_rule_4_the_catalogue_by_priority(pair: House, upstream: Upstream) -> None:
    pair.provide("preferred", f"{upstream.url}/v1", models=("tiny",), priority=0)
    assert route_of(pair, "tiny") == ("catalogue", "preferred", "tiny")


def test_rule_5_the_active_provider_for_no_model_auto_and_default(pair: House) -> None:
    for model in (None, "", "auto", "default"):
        assert route_of(pair, model) == ("active:chat", "first", "tiny")


def test_rule_5_an_active_provider_without_a_model_uses_its_first(pair: House) -> None:
    pair.activate((2, ""))
    assert route_of(pair) == ("active:chat", "second", "big")


def test_rule_6_anything_else_is_not_found(pair: House) -> None:
    for body in ({"model": "unheard-of"}, {"model": "nobody/tiny"}, {"model": None, "provider_id": "nobody"}):
        response = pair.ask(**body)
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_provider_that_is_down_is_passed_over(pair: House, upstream: Upstream) -> None:
    pair.weather(down={1: "connection refused"})
    assert route_of(pair) == ("active:chat", "second", "big")
    assert not upstream.ledger.asked


def test_when_all_are_down_the_first_gets_a_forced_trial(pair: House) -> None:
    pair.weather(down={1: "timeout", 2: "timeout"})
    assert route_of(pair) == ("active:chat", "first", "tiny")


def test_what_a_person_took_out_is_never_tried(pair: House, upstream: Upstream) -> None:
    pair.weather(down={1: "", 2: ""}, overridden=frozenset({1, 2}))
    response = pair.ask(None)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "no_provider_available")
    assert response.headers["retry-after"]
    assert not upstream.ledger.asked


def test_a_vendor_without_a_key_is_503_and_nothing_is_dialled(house: House, upstream: Upstream) -> None:
    house.provide("vendor", f"{upstream.url}/v1", kind="openai", key="")
    response = house.ask("vendor/tiny")
    assert (response.status_code, response.json()["error"]["code"]) == (503, "credential_unavailable")
    assert not upstream.ledger.asked


def test_r02_r03_a_key_that_does_not_open_is_503_and_others_go_on(pair: House, upstream: Upstream) -> None:
    from dataclasses import replace

    first = pair.watcher.snapshot.upstreams[1]
    other = pair.watcher.snapshot.upstreams[2].credentials[0]
    # The ciphertext of another row, as an administrator of the database could copy it.
    swapped = replace(first, credentials=(replace(first.credentials[0], stored=other.stored),))
    pair._change(upstreams={**pair.watcher.snapshot.upstreams, 1: swapped})

    response = pair.ask("first/tiny")

    assert (response.status_code, response.json()["error"]["code"]) == (503, "credential_unavailable")
    assert not upstream.ledger.asked
    assert route_of(pair) == ("active:chat", "second", "big")


def test_a_key_pool_shares_by_weight_and_passes_over_refused_keys(house: House, upstream: Upstream) -> None:
    from dataclasses import replace

    house.provide("pool", f"{upstream.url}/v1", key="sk-first-0123456789")
    pool = house.watcher.snapshot.upstreams[1]
    one = pool.credentials[0]
    dead = replace(one, key_id=99, stored="v1.broken")
    house._change(upstreams={1: replace(pool, credentials=(dead, one))})
    house.weather(rejected=frozenset({99}))

    assert all(house.ask("pool/tiny").status_code == 200 for _ in range(5))
