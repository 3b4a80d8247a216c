"""What an attempt costs, from the price that was known when it was planned to the record that people read."""

from __future__ import annotations

from typing import Any

import pytest

from audit.changes import changes
from providers.models import Provider
from proxy import prices, usage
from proxy.attempts import Attempt
from proxy.metrics import registry
from proxy.models import ModelPrice, UsageRecord
from proxy.pricing import Price, Rate
from proxy.strategies import Node
from proxy.usage_rows import usage_row
from tests.support import answers, faults
from tests.support.inprocess import House
from tests.support.upstream import Upstream

CHEAP = Price(11, Rate(1_000_000_000), Rate(2_000_000_000))
"""A dollar in and two out, for a million tokens: 1,000 and 2,000 nano-dollars each."""
DEAR = Price(12, Rate(3_000_000_000), Rate(4_000_000_000), request=7)


def bill(record: dict[str, Any]) -> tuple[int | None, int | None]:
    return record["cost_nanodollars"], record["price_id"]


def metric(name: str, provider: str) -> float:
    return registry().get_sample_value(name, {"provider": provider}) or 0.0


@pytest.mark.no_database
@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_is_billed_by_its_usage_and_names_its_price(pair: House, stream: bool) -> None:
    pair.charge((1, "tiny", CHEAP))
    assert pair.ask(None, stream=stream).status_code == 200
    (record,) = pair.records()
    expected = record["prompt_tokens"] * 1000 + record["completion_tokens"] * 2000
    assert record["tokens_source"] == "provider" and expected > 0
    assert bill(record) == (expected, 11)


@pytest.mark.no_database
def test_f47_an_unknown_price_is_null_and_counted_and_never_zero(pair: House) -> None:
    unpriced, cost = (
        metric("penstock_unpriced_total", "first"),
        metric("penstock_cost_dollars_total", "first"),
    )
    assert pair.ask(None).status_code == 200
    assert bill(pair.records()[0]) == (None, None)
    assert metric("penstock_unpriced_total", "first") == unpriced + 1
    assert metric("penstock_cost_dollars_total", "first") == cost


@pytest.mark.no_database
def test_what_costs_nothing_costs_0_by_a_price_that_says_so(pair: House) -> None:
    unpriced = metric("penstock_unpriced_total", "first")
    pair.charge((1, "*", Price(9)))
    pair.ask(None)
    assert bill(pair.records()[0]) == (0, 9)
    assert metric("penstock_unpriced_total", "first") == unpriced


@pytest.mark.no_database
def test_estimated_tokens_are_billed_too(pair: House, upstream: Upstream) -> None:
    pair.charge((1, "tiny", CHEAP))
    upstream.behave(faults.reset_after(3))
    pair.ask(None, stream=True)
    record = pair.records()[0]
    assert record["tokens_source"] == "estimated" and record["completion_tokens"] == 3
    assert bill(record) == (record["prompt_tokens"] * 1000 + 3 * 2000, 11)


@pytest.mark.no_database
def test_what_a_provider_did_not_take_costs_nothing_and_the_next_one_is_billed_by_its_own_price(
    pair: House, upstream: Upstream
) -> None:
    pair.charge((1, "tiny", DEAR), (2, "big", CHEAP))
    upstream.behave(answers.status(500))
    assert pair.ask(None).status_code == 200
    first, second = pair.records(2)
    assert bill(first) == (0, 12)
    assert bill(second) == (second["prompt_tokens"] * 1000 + second["completion_tokens"] * 2000, 11)


@pytest.mark.no_database
def test_what_was_not_taken_and_has_no_price_is_null_and_no_alarm(pair: House, upstream: Upstream) -> None:
    unpriced = metric("penstock_unpriced_total", "first")
    upstream.behave(answers.status(500))
    pair.ask(None)
    first = pair.records(2)[0]
    assert bill(first) == (None, None)
    assert first["tokens_source"] == "none"
    assert metric("penstock_unpriced_total", "first") == unpriced


@pytest.mark.no_database
@pytest.mark.parametrize(
    "told",
    [
        {"prompt_tokens": -5, "completion_tokens": 7},
        {"prompt_tokens": 2**63, "completion_tokens": 7},
        {"prompt_tokens": 1.5, "completion_tokens": 7},
        {"prompt_tokens": "12", "completion_tokens": 7},
        {"prompt_tokens": True, "completion_tokens": 7},
        {},
        None,
        7,
    ],
)
def test_r36_usage_that_cannot_be_true_is_estimated_and_billed_by_that(
    pair: House, upstream: Upstream, told: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair.charge((1, "tiny", CHEAP))
    monkeypatch.setattr(answers.Answer, "tokens", lambda self, request: told)
    assert pair.ask(None).status_code == 200
    record = pair.records()[0]
    assert record["tokens_source"] == "estimated"
    assert bill(record) == (record["prompt_tokens"] * 1000 + record["completion_tokens"] * 2000, 11)


@pytest.mark.no_database
def test_a_price_that_changes_while_a_request_runs_is_not_its_price(pair: House, upstream: Upstream) -> None:
    pair.charge((1, "tiny", CHEAP))
    settle = Attempt.settle

    def late(self: Attempt, *args: Any, **kwargs: Any) -> None:
        pair.charge((1, "tiny", DEAR))
        settle(self, *args, **kwargs)

    Attempt.settle = late  # type: ignore[method-assign]  # the moment between the answer and its record
    try:
        pair.ask(None)
    finally:
        Attempt.settle = settle  # type: ignore[method-assign]
    assert pair.records()[0]["price_id"] == 11


@pytest.mark.no_database
def test_cheapest_goes_by_these_prices(pair: House) -> None:
    pair.charge((1, "tiny", DEAR), (2, "big", CHEAP))
    pair.route("thrifty", Node(1, 1), Node(2, 2), strategy="cheapest")
    for _ in range(4):
        assert pair.ask("thrifty").headers["x-penstock-provider"] == "second"
    pair.route("thrifty", Node(1, 1, price=0.1), Node(2, 2), strategy="cheapest")
    assert pair.ask("thrifty").headers["x-penstock-provider"] == "first"


# -- in the record ---------------------------------------------------------------------------------------------------------


@pytest.mark.no_database
@pytest.mark.parametrize(
    ("told", "kept", "wrong"),
    [
        ({"cost_nanodollars": 5, "price_id": 3}, (5, 3), []),
        ({"cost_nanodollars": 0, "price_id": 3}, (0, 3), []),
        ({"cost_nanodollars": None, "price_id": None}, (None, None), []),
        ({}, (None, None), []),
        ({"cost_nanodollars": -5, "price_id": 3}, (0, 3), ["cost_nanodollars"]),
        ({"cost_nanodollars": 2**70, "price_id": 3}, (2**63 - 1, 3), ["cost_nanodollars"]),
        ({"cost_nanodollars": "5", "price_id": 3}, (None, None), ["cost_nanodollars"]),
        ({"cost_nanodollars": float("nan"), "price_id": 3}, (None, None), ["cost_nanodollars"]),
        ({"cost_nanodollars": 5}, (None, None), ["cost_nanodollars"]),
        ({"price_id": 3}, (None, None), ["cost_nanodollars"]),
    ],
)
def test_a_cost_in_the_spool_is_checked_before_it_is_a_row(
    told: dict[str, Any], kept: tuple[int | None, int | None], wrong: list[str]
) -> None:
    row = usage_row({"id": "0190" + "0" * 28, "status": "success", "created_at": 1, **told})
    assert row is not None
    assert bill(row) == kept
    assert (row["trace"] or {}).get("usage_invalid", []) == wrong


@pytest.mark.django_db
def test_a_bill_is_made_of_our_rows_and_a_price_of_today_changes_no_record_of_yesterday(pair: House) -> None:
    provider = Provider.objects.get(pk=1)

    def charge(prompt: int) -> ModelPrice:
        row = ModelPrice(model="tiny", prompt=prompt, completion=prompt)
        with changes(actor=None, via="system"):
            prices.add_override(row, provider)
        pair.price_by(prices.book({"openai-compatible"}, {1}))
        return row

    yesterday = charge(1_000_000_000)
    pair.ask(None)
    today = charge(5_000_000_000)
    pair.ask(None)
    pair.records(2)
    pair.stop()
    usage.drain(pair.spool_dir)

    first, second = UsageRecord.objects.order_by("id")
    assert (first.price_id, second.price_id) == (yesterday.pk, today.pk)
    assert first.cost_nanodollars == first.total_tokens * 1000
    assert second.cost_nanodollars == second.total_tokens * 5000
    yesterday.refresh_from_db()
    assert yesterday.prompt == 1_000_000_000
    assert not first.unpriced and prices.unpriced(first.created_at).requests == 0
