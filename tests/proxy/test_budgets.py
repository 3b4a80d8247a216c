"""What a budget lets through, what it refuses, and what is charged to it; with the books in memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any, cast

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.budgets import COMPLETION_TOKENS, Asked, Hold, most
from proxy.candidates import Candidate
from proxy.grants import IDLE_SECONDS, REST_SECONDS, Grants
from proxy.pricing import Price, Rate
from proxy.purses import NEVER, WINDOWS, Allowance, Purse, window_at
from proxy.spool import Spool
from tests.support import answers, faults
from tests.support.books import Books
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

A_TOKEN = 1_000_000
"""A nano-dollar for each token, so that amounts below are tokens."""


@pytest.fixture
def shop(house: House, upstream: Upstream) -> House:
    """A data plane whose upstream answers with five tokens, each at a nano-dollar."""
    house.activate((house.provide("first", f"{upstream.url}/v1"), "tiny"))
    price(house, completion=A_TOKEN)
    return house


def price(house: House, **rates: int) -> None:
    """What every model costs, in nano-dollars per million tokens; without any, nobody knows."""
    said = Price(1)._replace(**cast(Any, {name: Rate(rate) for name, rate in rates.items()}))
    house.charge(*((number, "*", said) for number in (1, 2) if rates))


def budgeted(house: House, amount: int, **how: Any) -> str:
    """A key with a budget."""
    number = house.budget(amount, **how)
    return house.issue(f"key {number}", budgets=(number,))


def refusal(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def purses(house: House) -> list[Purse]:
    return [account.purse for account in house.gateway.grants._accounts.values()]


def eventually(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# -- served and refused ------------------------------------------------------------------------------------------------------


def test_a_request_is_held_settled_and_its_record_says_what_is_charged(shop: House) -> None:
    key = budgeted(shop, 6400)
    assert shop.ask(key=key, max_tokens=20).status_code == 200
    record = shop.records()[0]
    assert record["budgets"] == [[1, "total", 0]]
    assert record["cost_nanodollars"] == 5
    assert record["grants"] == [5]
    assert record["trace"]["budgets"] == [1]
    (purse,) = purses(shop)
    eventually(lambda: purse.reserved == 0)
    assert (purse.granted, purse.consumed) == (200, 5)


def test_a_key_without_a_budget_asks_nobody_and_says_nothing(shop: House) -> None:
    shop.budget(0)
    assert shop.ask().status_code == 200
    assert "budgets" not in shop.records()[0]
    assert "budgets" not in shop.records()[0]["trace"]
    assert shop.books.asked == []


def test_r42_of_fifty_at_once_a_budget_for_ten_lets_ten_through(shop: House, upstream: Upstream) -> None:
    key = budgeted(shop, 50)
    body = {"model": "tiny", "max_tokens": 5, "messages": [{"role": "user", "content": "hello"}]}
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(timeout=30, headers=headers) as client, ThreadPoolExecutor(50) as pool:
        address = f"{shop.url}/v1/chat/completions"
        told = list(pool.map(lambda _: client.post(address, json=body), range(50)))
    assert [each.status_code for each in told].count(200) == len(upstream.ledger.asked) == 10
    refused = [each for each in told if each.status_code != 200]
    assert {refusal(each) for each in refused} == {(402, "budget_exceeded")}
    assert sum(record["cost_nanodollars"] for record in shop.records(10)) == 50


def test_a_refusal_says_when_not_to_try_again(shop: House) -> None:
    key = budgeted(shop, 4, window="month")
    refused = shop.ask(key=key, max_tokens=5)
    assert refusal(refused) == (402, "budget_exceeded")
    assert refused.headers["x-should-retry"] == "false"
    assert "retry-after" not in refused.headers
    error = refused.json()["error"]
    assert error["type"] == "insufficient_quota"
    begins = datetime.fromtimestamp(window_at("month", time.time())[1], UTC)
    assert f"of this key. It begins anew at {begins:%Y-%m-%d} 00:00 UTC." in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"max_tokens": 200_000, "max_completion_tokens": 1},
        {"max_tokens": 1, "max_completion_tokens": 200_000},
        {"max_tokens": 200_000.0},
        {"max_tokens": "200000"},
        {"max_tokens": 1000, "n": 200.0},
    ],
)
def test_whatever_an_upstream_may_heed_is_held(shop: House, upstream: Upstream, body: dict[str, Any]) -> None:
    key = budgeted(shop, 100_000)
    assert refusal(shop.ask(key=key, **body)) == (402, "budget_exceeded")
    assert upstream.ledger.asked == []
    assert shop.ask(key=key, max_tokens=1000, n=2).status_code == 200


def test_the_books_are_not_asked_while_the_grant_is_enough(shop: House) -> None:
    key = budgeted(shop, 32_000)
    for _ in range(6):
        assert shop.ask(key=key, max_tokens=5).status_code == 200
    assert shop.books.asked == [5]


def test_a_refusal_is_remembered_for_a_moment_and_a_smaller_request_is_another_question(shop: House) -> None:
    key = budgeted(shop, 10)
    body = {"model": "tiny", "max_tokens": 11, "messages": [{"role": "user", "content": "hello"}]}
    with httpx.Client(headers={"Authorization": f"Bearer {key}"}) as client:
        for _ in range(20):
            assert client.post(f"{shop.url}/v1/chat/completions", json=body).status_code == 402
    # Once a second at the most, however long these took.
    assert 1 <= len(shop.books.asked) < 10
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    assert shop.books.asked[-1] == 5
    shop.books.limits[1] = 100
    eventually(lambda: shop.ask(key=key, max_tokens=11).status_code == 200)


def test_what_comes_before_402_is_told_first(shop: House) -> None:
    key = budgeted(shop, 0)
    assert refusal(shop.ask("nothing", key=key)) == (404, "model_not_found")
    assert refusal(shop.ask("tiny", key=key, stream="x")) == (400, "invalid_request")


def test_all_budgets_that_apply_are_held_and_the_smallest_decides(shop: House) -> None:
    numbers = (shop.budget(100), shop.budget(5, of="this key's owner"))
    key = shop.issue("app", budgets=numbers)
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    refused = shop.ask(key=key, max_tokens=5)
    assert refusal(refused) == (402, "budget_exceeded")
    assert "this key's owner" in refused.json()["error"]["message"]
    eventually(lambda: [purse.reserved for purse in purses(shop)] == [0, 0])
    assert shop.records()[0]["budgets"] == [[1, "total", 0], [2, "total", 0]]


def test_a_soft_budget_is_charged_and_never_refuses(shop: House) -> None:
    key = budgeted(shop, 0, hard=False)
    shop.books.away = True
    assert shop.ask(key=key).status_code == 200
    assert shop.records()[0]["budgets"] == [[1, "total", 0]]
    assert shop.records()[0]["grants"] == [0]
    price(shop)
    assert shop.ask(key=key).status_code == 200


def test_what_nobody_knows_the_price_of_is_refused_where_there_is_a_budget_to_keep(
    shop: House, upstream: Upstream
) -> None:
    key = budgeted(shop, 1000)
    price(shop)
    refused = shop.ask(key=key)
    assert refusal(refused) == (402, "price_unknown")
    assert refused.headers["x-should-retry"] == "false"
    assert shop.ask().status_code == 200
    assert len(upstream.ledger.asked) == 1


def test_what_is_free_needs_no_budget(shop: House) -> None:
    key = budgeted(shop, 0)
    price(shop, completion=0)
    assert shop.ask(key=key).status_code == 200


# -- providers ---------------------------------------------------------------------------------------------------------------


def test_a_provider_whose_budget_is_used_up_is_left_for_the_next(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    price(pair, completion=A_TOKEN)
    pair.budget(7, of="the provider", provider=1)
    for name in ("first", "second"):
        answered = pair.ask(None, max_tokens=5)
        assert answered.headers["x-penstock-provider"] == name
    first, second = pair.records(2)
    assert first["budgets"] == [[1, "total", 0]]
    assert "budgets" not in second
    assert any("budget_exceeded" in line for line in second["trace"]["candidates"])
    assert (len(upstream.ledger.asked), len(fallback.ledger.asked)) == (1, 1)


def test_402_when_the_budgets_of_all_providers_are_used_up(pair: House) -> None:
    price(pair, completion=A_TOKEN)
    for number in (1, 2):
        pair.budget(4, of="the provider", provider=number)
    assert refusal(pair.ask(None, max_tokens=5)) == (402, "budget_exceeded")


def test_a_request_is_held_at_the_dearest_candidate(pair: House) -> None:
    price(pair, completion=A_TOKEN)
    pair.know(2, "big", context_window=3)
    key = budgeted(pair, 64_000)
    pair.know(1, "tiny", context_window=40)
    assert pair.ask(None, key=key).status_code == 200
    assert pair.books.asked == [40]


async def test_a_hold_stays_in_the_window_that_it_began_in() -> None:
    now = [10 * 86400.0 - 1]
    grants, allowance = (
        Grants("w", ledger=Books({1: 10**9}), clock=lambda: now[0]),
        Allowance(1, "the provider", "day", True),
    )
    before = grants.account(allowance).purse
    with Hold() as held:
        await held.provider(grants, allowance, 7, 100)
        now[0] += 2
        await held.provider(grants, allowance, 7, 150)
        assert before.reserved == 150
    assert (before.reserved, grants.account(allowance).purse.reserved) == (0, 0)


def test_r42_what_broken_attempts_have_cost_is_had_once_more_before_the_next(
    house: House, upstream: Upstream
) -> None:
    """Each is billed for a prompt that its provider took, and the hold was for one."""
    numbers = [house.provide(name, f"{upstream.url}/v1") for name in ("first", "second", "third")]
    a_token = Price(1)._replace(prompt=Rate(A_TOKEN), completion=Rate(A_TOKEN))
    house.charge(*((number, "*", a_token) for number in numbers))
    house.activate(*((number, "tiny") for number in numbers))
    upstream.behave(faults.cut_json())
    question = [{"role": "user", "content": "{}[];" * 2000}]
    for amount, attempts in ((3500, 1), (20_000, 3)):
        asked = len(upstream.ledger.asked)
        told = house.ask(None, key=budgeted(house, amount), max_tokens=10, messages=question)
        assert told.status_code == 502
        assert len(upstream.ledger.asked) - asked == attempts


# -- every way out -----------------------------------------------------------------------------------------------------------


def test_a_request_that_fails_holds_nothing_and_costs_nothing(shop: House, upstream: Upstream) -> None:
    key = budgeted(shop, 5)
    upstream.behave(answers.status(500))
    assert shop.ask(key=key, max_tokens=5).status_code == 502
    upstream.behave(answers.ok())
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    records = shop.records(2)
    assert {record["cost_nanodollars"] for record in records[:-1]} == {0}
    assert records[-1]["grants"] == [5]


def test_f14_a_caller_who_leaves_is_charged_what_came_and_holds_nothing(
    shop: House, upstream: Upstream
) -> None:
    key = budgeted(shop, 3200)
    upstream.behave(answers.ok(chunks=1000, delay=0.01))
    body = {"model": "tiny", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
    with httpx.stream(
        "POST", f"{shop.url}/v1/chat/completions",
        json={**body, "max_tokens": 1000}, headers={"Authorization": f"Bearer {key}"},
    ) as stream:  # fmt: skip
        next(stream.iter_lines())
    record = shop.records()[0]
    assert record["status"] == "client_disconnected"
    assert record["grants"] == [record["cost_nanodollars"]]
    (purse,) = purses(shop)
    eventually(lambda: purse.reserved == 0)
    assert purse.consumed == record["cost_nanodollars"] < 1000


def test_every_attempt_of_a_request_is_charged(pair: House, upstream: Upstream) -> None:
    price(pair, completion=A_TOKEN, prompt=A_TOKEN)
    key = budgeted(pair, 32_000)
    upstream.behave(answers.raw(b"this is no completion"))
    assert pair.ask(None, key=key, max_tokens=5).status_code == 200
    records = pair.records(2)
    assert all(record["cost_nanodollars"] > 0 for record in records)
    assert [record["grants"] for record in records] == [[record["cost_nanodollars"]] for record in records]
    (purse,) = purses(pair)
    assert purse.consumed == sum(record["cost_nanodollars"] for record in records)


def test_an_answer_that_costs_more_than_was_held_is_charged_in_full(shop: House, upstream: Upstream) -> None:
    key = budgeted(shop, 5)
    upstream.behave(answers.ok(chunks=8))
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    record = shop.records()[0]
    assert (record["cost_nanodollars"], record["grants"]) == (8, [5])
    assert shop.ask(key=key, max_tokens=1).status_code == 402


# -- without a database ------------------------------------------------------------------------------------------------------


def test_without_a_database_requests_are_served_while_the_grant_lasts(shop: House) -> None:
    key = budgeted(shop, 320)
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    shop.books.away = True
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    refused = shop.ask(key=key, max_tokens=5)
    assert refusal(refused) == (503, "budget_unavailable")
    assert int(refused.headers["retry-after"]) >= 1
    assert shop.ask().status_code == 200
    shop.books.away = False
    time.sleep(REST_SECONDS)
    assert shop.ask(key=key, max_tokens=5).status_code == 200


def test_a_database_that_hangs_holds_no_request_for_long(shop: House) -> None:
    key = budgeted(shop, 320)
    shop.books.hold_up.clear()
    began = time.monotonic()
    assert refusal(shop.ask(key=key)) == (503, "budget_unavailable")
    assert time.monotonic() - began < 5
    began = time.monotonic()
    assert refusal(shop.ask(key=key)) == (503, "budget_unavailable")
    assert time.monotonic() - began < 1
    shop.books.hold_up.set()


def test_f26_what_the_usage_log_has_no_room_for_is_refused_and_holds_nothing(
    shop: House, upstream: Upstream
) -> None:
    key = budgeted(shop, 6400)
    assert shop.ask(key=key, max_tokens=20).status_code == 200
    room, shop.gateway.spool = shop.gateway.spool, Spool(shop.spool_dir / "full", max_bytes=0)
    shop.gateway.spool.run()
    assert refusal(shop.ask(key=key, max_tokens=20)) == (503, "usage_log_unavailable")
    assert len(upstream.ledger.asked) == 1
    (purse,) = purses(shop)
    eventually(lambda: purse.reserved == 0)
    assert purse.consumed == 5
    shop.gateway.spool.close()
    shop.gateway.spool = room
    assert shop.ask(key=key, max_tokens=20).status_code == 200
    eventually(lambda: purse.consumed == 10)


def test_an_idle_grant_goes_back(shop: House) -> None:
    key = budgeted(shop, 6400)
    assert shop.ask(key=key, max_tokens=5).status_code == 200
    (purse,) = purses(shop)
    assert purse.granted == 200
    eventually(lambda: purse.reserved == 0)
    purse.used_at -= IDLE_SECONDS
    eventually(lambda: list(shop.books.granted.values()) == [5] and purse.granted == 5)
    assert shop.ask(key=key, max_tokens=5).status_code == 200


# -- arithmetic --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "start", "end"),
    [
        ("day", "2024-02-29", "2024-03-01"),
        ("week", "2024-02-26", "2024-03-04"),
        ("month", "2024-02-01", "2024-03-01"),
    ],
)
def test_windows_begin_at_midnight_utc(window: str, start: str, end: str) -> None:
    now = datetime(2024, 2, 29, 23, 59, 59, tzinfo=UTC).timestamp()
    begins, ends = window_at(window, now)
    assert datetime.fromtimestamp(begins, UTC).isoformat() == f"{start}T00:00:00+00:00"
    assert datetime.fromtimestamp(ends, UTC).isoformat() == f"{end}T00:00:00+00:00"


@given(now=st.floats(0, 4e9), window=st.sampled_from(WINDOWS))
def test_every_moment_lies_in_one_window_and_windows_touch(now: float, window: str) -> None:
    start, ends = window_at(window, now)
    assert start <= now < ends
    if ends != NEVER:
        assert window_at(window, ends)[0] == ends
        assert window_at(window, start)[0] == start


def test_a_new_window_is_another_account_and_a_request_stays_in_the_one_it_began_in() -> None:
    now = [datetime(2024, 2, 29, 23, 59, tzinfo=UTC).timestamp()]
    grants = Grants("a" * 32, clock=lambda: now[0])
    allowance = Allowance(1, "this key", "day", True)
    before = grants.account(allowance)
    assert grants.account(allowance) is before
    now[0] += 60
    after = grants.account(allowance)
    assert after is not before
    assert before.purse.ends == after.purse.key.start
    now[0] -= 60
    assert grants.account(allowance) is before
    assert grants.account(allowance._replace(window="month")) not in (before, after)


def candidate(**fields: Any) -> Candidate:
    price = Price(1, prompt=Rate(A_TOKEN), completion=Rate(2 * A_TOKEN))
    return Candidate(None, "tiny", **{"price": price, **fields})  # type: ignore[arg-type]  # whose it is does not matter


@pytest.mark.parametrize(
    ("asked", "window", "tokens"),
    [
        (Asked(299, 50), None, (100, 50)),
        (Asked(299, 50, 3), None, (100, 150)),
        (Asked(0), None, (1, COMPLETION_TOKENS)),
        (Asked(0), 1000, (1, 1000)),
        (Asked(0, 10**30), 1000, (1, 1000)),
    ],
)
def test_what_is_held_is_the_prompt_and_the_largest_answer(
    asked: Asked, window: int | None, tokens: tuple[int, int]
) -> None:
    assert most(candidate(window=window), asked) == tokens[0] + 2 * tokens[1]


def test_without_a_price_nobody_knows_what_to_hold() -> None:
    assert most(candidate(price=None), Asked(10, 10)) is None
