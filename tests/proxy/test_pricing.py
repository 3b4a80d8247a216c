"""What an answer costs, whatever its numbers say."""

from __future__ import annotations

from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

import pytest
from genai_prices.data import providers
from genai_prices.types import Usage as TheirUsage
from hypothesis import given
from hypothesis import strategies as st

from providers.adapters.openai import read_usage
from providers.wire import Usage
from proxy import price_source
from proxy.models.prices import price_of
from proxy.pricing import MOST, NANO, Price, Rate, dollars_of, nano_of

pytestmark = pytest.mark.no_database

GPT = Price(1, Rate(2_500_000_000), Rate(10_000_000_000), cached=Rate(1_250_000_000))
"""Dollars for a million tokens: 2.5 in, 10 out, 1.25 cached."""
NOW = datetime(2026, 11, 25, 12, tzinfo=UTC)

rates = st.builds(
    Rate,
    st.integers(0, 10**15),
    st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 10**15)), max_size=3).map(
        lambda tiers: tuple(sorted(tiers))
    ),
)
prices = st.builds(
    Price,
    st.just(1),
    rates,
    rates,
    st.none() | rates,
    st.none() | rates,
    st.none() | rates,
    st.integers(0, 10**15),
)
numbers = st.integers(min_value=-(2**70), max_value=2**70)


def test_prompt_and_completion_are_paid_by_the_million() -> None:
    assert GPT.cost(Usage(1_000_000, 1_000_000)) == 12_500_000_000
    assert GPT.cost(Usage(1, 0)) == 2500
    assert GPT.cost(Usage()) == 0


def test_cached_tokens_are_part_of_the_prompt_and_cost_their_own() -> None:
    assert GPT.cost(Usage(1000, 0, cached=400)) == 600 * 2500 + 400 * 1250


def test_without_a_price_of_their_own_cached_and_written_and_reasoning_cost_what_the_others_do() -> None:
    plain = Price(1, Rate(1_000_000), Rate(2_000_000))
    assert plain.cost(Usage(10, 10, cached=4, cache_write=3, reasoning=9)) == plain.cost(Usage(10, 10))


def test_written_and_reasoning_tokens_cost_their_own() -> None:
    price = Price(1, Rate(1_000_000), Rate(2_000_000), cache_write=Rate(3_000_000), reasoning=Rate(5_000_000))
    assert price.cost(Usage(10, 10, cache_write=4, reasoning=6)) == 6 * 1 + 4 * 3 + 4 * 2 + 6 * 5


def test_a_tier_is_for_all_tokens_once_the_prompt_is_longer() -> None:
    price = Price(
        1, Rate(1_000_000, ((200, 2_000_000), (400, 3_000_000))), Rate(10_000_000, ((200, 20_000_000),))
    )
    assert price.cost(Usage(200, 1)) == 200 + 10
    assert price.cost(Usage(201, 1)) == 402 + 20
    assert price.cost(Usage(401, 1)) == 1203 + 20


def test_what_a_request_costs_by_itself_is_added_once() -> None:
    assert Price(1, request=12_000_000).cost(Usage(5, 5)) == 12_000_000


def test_it_is_rounded_half_up_and_only_at_the_end() -> None:
    price = Price(1, Rate(500_000), Rate(250_000))
    assert price.cost(Usage(1, 0)) == 1
    assert price.cost(Usage(0, 1)) == 0
    assert price.cost(Usage(1, 1)) == 1
    assert price.cost(Usage(2, 2)) == 2


def test_a_part_that_is_larger_than_its_whole_is_taken_for_the_whole() -> None:
    assert GPT.cost(Usage(10, 10, cached=99, reasoning=99)) == 10 * 1250 + 10 * 10_000


@given(price=prices, usage=st.builds(Usage, *[numbers] * 5))
def test_r36_a_cost_is_never_negative_and_never_wraps(price: Price, usage: Usage) -> None:
    cost = price.cost(usage)
    assert type(cost) is int and 0 <= cost <= MOST


@given(
    price=prices,
    parts=st.lists(
        st.floats() | st.text(max_size=4) | st.booleans() | st.none() | numbers, min_size=5, max_size=5
    ),
)
def test_r36_what_is_no_count_is_not_charged(price: Price, parts: list[Any]) -> None:
    counts = [part if type(part) is int else 0 for part in parts]
    assert price.cost(Usage(*parts)) == price.cost(Usage(*counts)) >= 0


anything = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just([1])
told = st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": anything,
        "completion_tokens": anything,
        "prompt_cache_hit_tokens": anything,
        "prompt_tokens_details": anything
        | st.fixed_dictionaries({"cached_tokens": anything, "cache_write_tokens": anything}),
        "completion_tokens_details": anything | st.fixed_dictionaries({"reasoning_tokens": anything}),
    },
)


@given(usage=told | anything, price=prices)
def test_r36_whatever_a_provider_tells_of_usage_is_a_good_cost_or_none(usage: Any, price: Price) -> None:
    read = read_usage({"usage": usage})
    if read is not None:
        assert all(type(part) is int and 0 <= part <= 10**9 for part in read)
        assert 0 <= price.cost(read) <= MOST


@given(
    price=prices,
    prompt=st.integers(0, 10**6),
    completion=st.integers(0, 10**6),
    shares=st.lists(st.floats(0, 1), min_size=5, max_size=5),
)
def test_nothing_costs_more_than_the_dearest(
    price: Price, prompt: int, completion: int, shares: list[float]
) -> None:
    used, said = int(prompt * shares[0]), int(completion * shares[1])
    usage = Usage(used, said, int(used * shares[2]), int(used * shares[3]), int(said * shares[4]))
    assert price.cost(usage) <= price.dearest(prompt, completion)


@given(st.integers(0, 10**15))
def test_dollars_and_nano_dollars_are_each_other_exactly(nano: int) -> None:
    assert nano_of(dollars_of(nano)) == nano
    assert nano_of(Decimal(f"{dollars_of(nano):f}")) == nano


# -- beside the package that the prices are from -------------------------------------------------------------------------


def listed() -> list[tuple[Any, Price]]:
    """Every model of theirs with the price that we make of it at noon of a day."""
    _, models = price_source.read()
    found = {(model.vendor, model.name): model for model in models}
    pairs = []
    for provider in providers:
        for info in provider.models:
            if (model := found.get((provider.id, info.id))) is not None:
                offer = [each for each in model.offers if each.since <= NOW][-1]
                second = 12 * 3600
                hours = [each for each in offer.rates["hours"] if each["from"] <= second < each["until"]]
                pairs.append((info, price_of(1, hours[-1] if hours else offer.rates)))
    return pairs


@pytest.mark.parametrize(
    "usage", [Usage(1000, 500), Usage(10_000, 200, cached=4000), Usage(300_000, 1000, 100_000, 50_000)]
)
def test_we_charge_what_the_package_says_that_vendors_do(usage: Usage) -> None:
    pairs = listed()
    assert len(pairs) > 1000
    theirs = TheirUsage(
        input_tokens=usage.prompt,
        output_tokens=usage.completion,
        cache_read_tokens=usage.cached,
        cache_write_tokens=usage.cache_write,
    )
    for info, price in pairs:
        told = info.get_prices(NOW).calc_price(theirs)["total_price"] * NANO
        # A rate with more than nine digits is rounded once, when it is taken over.
        assert abs(price.cost(usage) - int(told.quantize(Decimal(1), ROUND_HALF_UP))) <= 1, info.id
