"""The pages of budgets, and the budget on the page of a key."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry
from proxy import keys
from proxy.admin import start
from proxy.models import Budget, GatewayKey
from proxy.models.budgets import NANO

pytestmark = pytest.mark.django_db
LIST, ADD = reverse("admin:proxy_budget_changelist"), reverse("admin:proxy_budget_add")


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def key() -> GatewayKey:
    key = GatewayKey(name="shop")
    keys.give_secret(key)
    with changes(actor=None, via="system"):
        key.save()
    return key


def a_budget(key: GatewayKey, spent: int = 0, held: int = 0, **fields: Any) -> Budget:
    with changes(actor=None, via="system"):
        budget = Budget.objects.create(gateway_key=key, amount=10 * NANO, **fields)
    account = budget.account
    account.spent, account.held = spent * NANO, held * NANO
    account.save()
    return budget


def form_of(client: Client, address: str) -> dict[str, Any]:
    """What the page would send if nothing was changed on it."""
    form = client.get(address).context["adminform"].form
    values = {name: form[name].value() for name in form.fields}
    return {
        name: "\n".join(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value not in (None, False)
    }


def test_a_budget_is_made_and_recorded(owner: User) -> None:
    with changes(actor=None, via="system"):
        team = Group.objects.create(name="ml")
    sent = {"team": team.pk, "amount": "12.50", "window": "week", "hard": "on", "warn_at_percent": "70"}
    assert logged_in(owner).post(ADD, sent).status_code == 302
    budget = Budget.objects.get()
    assert (budget.team, budget.amount, budget.window, budget.created_by) == (
        team,
        12_500_000_000,
        "week",
        "owner",
    )
    assert Entry.objects.get(action="add_budget").entity_name == "team ml"


@pytest.mark.parametrize(
    "wrong", [{"team": ""}, {"amount": "-1"}, {"warn_at_percent": "101"}, {"user": "SELF"}]
)
def test_a_wrong_budget_is_a_form_error(owner: User, wrong: dict[str, str]) -> None:
    with changes(actor=None, via="system"):
        team = Group.objects.create(name="ml")
    sent = {"team": team.pk, "amount": "1", "window": "week", "warn_at_percent": "70"}
    wrong = {name: str(owner.pk) if value == "SELF" else value for name, value in wrong.items()}
    answer = logged_in(owner).post(ADD, {**sent, **wrong})
    assert answer.status_code == 200
    assert answer.context["adminform"].form.errors
    assert not Budget.objects.exists()


@pytest.mark.parametrize(
    ("spent", "fields", "told"),
    [
        (1, {}, "within"),
        (8, {}, "over 80 %"),
        (10, {}, "used up"),
        (1, {"hard": False}, "only warns"),
    ],
)
def test_the_list_says_how_far_each_is(
    owner: User, key: GatewayKey, spent: int, fields: dict[str, Any], told: str
) -> None:
    a_budget(key, spent, **fields)
    page = logged_in(owner).get(LIST).content.decode()
    assert told in page
    assert f'value="{10 * spent}"' in page and f"${spent}.00" in page and "of $10.00" in page


def test_r42_saving_a_budget_or_its_key_during_traffic_never_changes_what_was_spent(
    owner: User, key: GatewayKey
) -> None:
    budget = a_budget(key, 3, 1)
    client = logged_in(owner)
    pages = (
        (reverse("admin:proxy_budget_change", args=[budget.pk]), {"amount": "20"}),
        (
            reverse("admin:proxy_gatewaykey_change", args=[key.pk]),
            {"budget_usd": "30", "budget_window": "month"},
        ),
    )
    for address, change in pages:
        sent = {**form_of(client, address), **change}
        account = budget.account
        account.spent += NANO
        account.save()
        answer = client.post(address, sent)
        assert answer.status_code == 302, answer.context["adminform"].form.errors
    budget.refresh_from_db()
    assert (budget.amount, budget.account.spent, budget.account.held) == (30 * NANO, 5 * NANO, NANO)


def test_the_page_of_a_key_shows_its_budget(owner: User, key: GatewayKey) -> None:
    a_budget(key, 4, window="day")
    page = logged_in(owner).get(reverse("admin:proxy_gatewaykey_change", args=[key.pk]))
    assert page.context["adminform"].form["budget_usd"].value() == "10"
    assert "$4.00" in page.content.decode() and "Begins anew" in page.content.decode()


def test_f40_a_page_of_a_key_that_is_out_of_date_does_not_overwrite_its_budget(
    owner: User, key: GatewayKey
) -> None:
    budget = a_budget(key)
    client, address = logged_in(owner), reverse("admin:proxy_gatewaykey_change", args=[key.pk])
    sent = form_of(client, address)
    with changes(actor=None, via="system"):
        budget.amount = 11 * NANO
        budget.save()
    assert "nothing was saved" in client.post(address, {**sent, "name": "store"}).content.decode()
    budget.refresh_from_db()
    assert budget.amount == 11 * NANO


def test_emptying_the_amount_takes_the_budget_away(owner: User, key: GatewayKey) -> None:
    a_budget(key)
    client, address = logged_in(owner), reverse("admin:proxy_gatewaykey_change", args=[key.pk])
    assert client.post(address, {**form_of(client, address), "budget_usd": ""}).status_code == 302
    assert not Budget.objects.exists()


def test_an_operator_issues_a_key_with_a_budget_and_only_looks_at_budgets(
    operator: User, key: GatewayKey
) -> None:
    client = logged_in(operator)
    sent = {"name": "app", "budget_usd": "2", "budget_window": "day"}
    assert client.post(reverse("admin:proxy_gatewaykey_add"), sent).status_code == 200
    made = Budget.objects.get()
    assert (made.subject_name, made.amount, made.window) == ("gateway key app", 2 * NANO, "day")
    assert client.get(LIST).status_code == 200
    assert client.get(reverse("admin:proxy_gatewaykey_change", args=[key.pk])).status_code == 200
    change = reverse("admin:proxy_budget_change", args=[made.pk])
    assert client.post(change, {"amount": "99", "window": "day", "warn_at_percent": "80"}).status_code == 403
    assert client.get(ADD).status_code == 403


def test_an_administrator_deletes_a_key_with_its_budget(owner: User, key: GatewayKey) -> None:
    a_budget(key, 1)
    address = reverse("admin:proxy_gatewaykey_delete", args=[key.pk])
    assert logged_in(owner).post(address, {"post": "yes"}).status_code == 302
    assert not Budget.objects.exists()


def test_the_start_page_tells_of_budgets_that_have_reached_their_percentage(key: GatewayKey) -> None:
    budget = a_budget(key, 7)
    assert start.budgets_warned() == []
    account = budget.account
    account.spent = 8 * NANO
    account.save()
    (problem,) = start.budgets_warned()
    assert (problem.title, problem.grave) == ("1 budget has reached the percentage to warn at", False)
    account.spent = 10 * NANO
    account.save()
    assert start.budgets_warned()[0].grave
