"""Budgets through the API: written by administrators, seen by those whom they are of, and as a view in gateway keys."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from rest_framework.test import APIClient

from audit.changes import changes
from audit.models import Entry
from proxy.models import Budget, BudgetAccount, GatewayKey
from proxy.models.budgets import NANO
from proxy.snapshot import build
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/budgets"
KEYS = f"{V1}/gateway-keys"


def issue(client: APIClient, name: str = "app", **fields: Any) -> dict[str, Any]:
    response = client.post(KEYS, {"name": name, **fields})
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def make(client: APIClient, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, {"amount_usd": 5, **fields})
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def spend(id: int, dollars: float, held: float = 0) -> None:
    account = Budget.objects.get(pk=id).account
    account.spent, account.held = int(dollars * NANO), int(held * NANO)
    account.save()


def test_a_budget_says_what_is_spent_held_and_left(owner: User) -> None:
    client = as_(owner)
    key = issue(client)
    made = make(client, gateway_key=key["id"], window="day", warn_at_percent=50)
    spend(made["id"], 1.5, 0.25)
    shown = client.get(f"{PATH}/{made['id']}").json()
    assert (shown["gateway_key"], shown["user"], shown["team"], shown["provider"]) == (
        key["id"],
        None,
        None,
        None,
    )
    assert (shown["amount_usd"], shown["spent_usd"], shown["held_usd"], shown["remaining_usd"]) == (
        5,
        1.5,
        0.25,
        3.25,
    )
    assert shown["hard"] is True
    assert shown["window_start"].endswith("T00:00:00Z") and shown["resets_at"].endswith("T00:00:00Z")
    assert Entry.objects.filter(action="add_budget", entity_name="gateway key app").exists()


def test_amounts_are_exact_as_numbers_and_as_text(owner: User) -> None:
    client = as_(owner)
    made = make(client, user="owner", amount_usd="0.000000001")
    assert Budget.objects.get().amount == 1
    client.patch(f"{PATH}/{made['id']}", {"amount_usd": 0.1})
    assert Budget.objects.get().amount == 100_000_000
    wrongs: tuple[Any, ...] = (-1, "1e10", "0.0000000001", "NaN", None, [], True)
    for wrong in wrongs:
        assert client.patch(f"{PATH}/{made['id']}", {"amount_usd": wrong}).status_code == 400, wrong
    assert Budget.objects.get().amount == 100_000_000


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"user": "owner", "provider": "openai"},
        {"user": "nobody"},
        {"team": "viewer"},
        {"gateway_key": 999},
        {"user": "owner", "window": "year"},
        {"user": "owner", "warn_at_percent": 0},
        {"user": "owner", "spent_usd": 0},
        {"user": "owner", "colour": "red"},
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_made(owner: User, wrong: dict[str, Any]) -> None:
    answer = as_(owner).post(PATH, {"amount_usd": 5, **wrong})
    assert answer.status_code == 400
    assert error(answer)["code"] == "VALIDATION_ERROR"
    assert not Budget.objects.exists()


def test_there_is_one_budget_of_each_and_it_stays_with_him(owner: User) -> None:
    client = as_(owner)
    made = make(client, provider="openai")
    assert client.post(PATH, {"amount_usd": 1, "provider": "openai"}).status_code == 400
    moved = client.patch(f"{PATH}/{made['id']}", {"provider": "anthropic"})
    assert "provider" in error(moved)["details"]
    assert client.put(f"{PATH}/{made['id']}", {**made, "amount_usd": 7}).status_code == 200
    assert client.delete(f"{PATH}/{made['id']}").status_code == 204
    assert Entry.objects.filter(action="delete_budget").exists()


def test_r48_what_was_spent_is_nobodys_to_write(owner: User) -> None:
    client = as_(owner)
    made = make(client, user="owner")
    spend(made["id"], 4)
    for name in ("spent_usd", "held_usd", "spent", "held", "account", "id", "created_by"):
        assert client.patch(f"{PATH}/{made['id']}", {name: 77}).status_code == 400, name
    client.patch(f"{PATH}/{made['id']}", {"amount_usd": 9})
    assert client.get(f"{PATH}/{made['id']}").json()["spent_usd"] == 4


def test_r49_a_member_sees_his_own_and_his_teams_budgets_and_changes_none(owner: User, person: Any) -> None:
    ann = person("ann", "member")
    with changes(actor=None, via="system"):
        team = Group.objects.create(name="ml")
        ann.groups.add(team)
    client = as_(owner)
    own = [make(client, user="ann"), make(client, team="ml")]
    own.append(make(client, gateway_key=issue(client, owner="ann")["id"]))
    own.append(make(client, gateway_key=issue(client, "of the team", owner="team:ml")["id"]))
    other = make(client, user="owner")
    seen = as_(ann)
    assert {row["id"] for row in seen.get(PATH).json()["results"]} == {row["id"] for row in own}
    assert seen.get(f"{PATH}/{other['id']}").status_code == 404
    assert seen.patch(f"{PATH}/{own[0]['id']}", {"amount_usd": 1000}).status_code == 403
    assert seen.delete(f"{PATH}/{own[0]['id']}").status_code == 403


def test_a_list_of_budgets_asks_the_database_a_few_times_however_long_it_is(owner: User) -> None:
    client = as_(owner)
    for number in range(3):
        make(client, gateway_key=issue(client, f"app {number}", budget_usd=None)["id"])
    counts = []
    for path in (PATH, KEYS):
        for size in (1, 3):
            with CaptureQueriesContext(
                connection,
            ) as asked:
                client.get(path, {"page_size": size})
            counts.append(len(asked))
    assert counts[0] == counts[1] and counts[2] == counts[3]
    assert max(counts) <= 12


# -- as a view in gateway keys -----------------------------------------------------------------------------------------------


def test_a_keys_budget_is_a_view_of_its_row(operator: User, owner: User) -> None:
    made = issue(as_(operator), budget_usd=2.5, budget_window="week")
    budget = Budget.objects.get()
    assert (budget.gateway_key_id, budget.amount, budget.window, budget.hard) == (
        made["id"],
        2_500_000_000,
        "week",
        True,
    )
    assert (made["budget_usd"], made["budget_window"], made["spent_usd"]) == (2.5, "week", 0)
    spend(budget.pk, 1)
    client, path = as_(owner), f"{KEYS}/{made['id']}"
    before = client.get(path)
    assert before.json()["spent_usd"] == 1
    after = client.patch(path, {"budget_usd": 3})
    assert (after.json()["budget_usd"], after.json()["budget_window"], after.json()["spent_usd"]) == (
        3,
        "week",
        1,
    )
    assert after.headers["ETag"] != before.headers["ETag"]
    put = client.put(path, {**after.json(), "name": "shop"})
    assert put.status_code == 200, put.content
    assert Budget.objects.get().amount == 3_000_000_000
    assert client.patch(path, {"budget_usd": None}).json()["budget_window"] is None
    assert not Budget.objects.exists() and not BudgetAccount.objects.exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"budget_usd": -1},
        {"budget_window": "month"},
        {"budget_usd": 1, "budget_window": "year"},
        {"spent_usd": 0},
    ],
)
def test_a_wrong_budget_makes_no_key(owner: User, wrong: dict[str, Any]) -> None:
    answer = as_(owner).post(KEYS, {"name": "app", **wrong})
    assert answer.status_code == 400
    assert next(iter(reversed(wrong))) in error(answer)["details"]
    assert not GatewayKey.objects.exists() and not Budget.objects.exists()


def test_the_snapshot_names_the_budgets_of_keys_and_providers(owner: User) -> None:
    client = as_(owner)
    key = issue(client, owner="owner", budget_usd=1)
    user = make(client, user="owner")
    with changes(actor=None, via="system"):
        from providers.models import Provider

        provider = Provider.objects.create(
            slug="here", name="here", kind="ollama", base_url="http://localhost:1"
        )
    own = make(client, provider="here", hard=False)
    other = issue(client, "other")
    snapshot = build()
    callers = {caller.id: caller.budgets for caller in snapshot.callers.values()}
    of_key = Budget.objects.get(gateway_key=key["id"]).pk
    assert callers == {key["id"]: (of_key, user["id"]), other["id"]: ()}
    assert snapshot.upstreams[provider.pk].budget == own["id"]
    assert [(each.of, each.hard) for _, each in sorted(snapshot.budgets.items())] == [
        ("this key", True), ("this key's owner", True), ("the provider", False),
    ]  # fmt: skip
