"""Whose answers are kept, and who may empty the cache: the settings of gateway keys, as people change them and requests see them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry
from providers import keyring
from proxy.auth import Caller
from proxy.configuration import document
from proxy.models import GatewayKey
from proxy.models.keys import MAX_CACHE_SECONDS
from proxy.snapshot import build
from proxy.usage_rows import usage_row
from tests.support.api import V1, as_, error
from tests.support.configuration import restored

pytestmark = pytest.mark.django_db
PATH = f"{V1}/gateway-keys"


def issue(client: Any, name: str, **fields: Any) -> dict[str, Any]:
    response = client.post(PATH, {"name": name, "cache_seconds": 60, **fields})
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def caller(made: dict[str, Any]) -> Caller:
    """The key as requests see it."""
    return build().callers[made["prefix"].removeprefix("pen_live_")]


def test_requests_see_for_how_long_a_key_keeps_answers(owner: User) -> None:
    client = as_(owner)
    made = issue(client, "desk", cache_seconds=300)
    assert (caller(made).cache_seconds, caller(made).keeps) == (300, True)
    assert client.patch(f"{PATH}/{made['id']}", {"cache_seconds": None}).json()["cache_seconds"] is None
    assert not caller(made).keeps
    assert Entry.objects.latest("seq").changes == {"cache_seconds": [300, None]}


@pytest.mark.parametrize("seconds", [0, -1, MAX_CACHE_SECONDS + 1, "soon", 1.5])
def test_a_time_that_makes_no_sense_is_refused(owner: User, seconds: Any) -> None:
    response = as_(owner).post(PATH, {"name": "desk", "cache_seconds": seconds})
    assert response.status_code == 400 and "cache_seconds" in error(response)["details"]


def test_r55_only_the_keys_of_one_owner_have_the_same_scope(owner: User, stranger: User) -> None:
    client = as_(owner)
    one, two = (issue(client, name, owner="stranger") for name in ("one", "two"))
    others = [issue(client, "three", owner="owner"), issue(client, "four"), issue(client, "five")]
    assert caller(one).cache_scope == caller(two).cache_scope
    assert len({caller(each).cache_scope for each in (one, *others)}) == 4


def test_emptying_the_cache_of_a_key_empties_its_owners_and_nobody_elses(owner: User, stranger: User) -> None:
    client = as_(owner)
    one, two = (issue(client, name, owner="stranger") for name in ("one", "two"))
    other = issue(client, "other")
    before = [caller(each).cache_scope for each in (one, two, other)]

    response = client.post(f"{PATH}/{one['id']}/empty-cache")

    assert response.status_code == 200 and response.json()["cache_emptied_at"]
    after = [caller(each).cache_scope for each in (one, two, other)]
    assert after[0] == after[1] != before[0] and after[2] == before[2]
    entry = Entry.objects.latest("seq")
    assert (entry.action, list(entry.changes)) == ("update_gateway_key", ["cache_emptied_at"])
    # A key that is made later, or switched off, does not bring back what was emptied.
    assert caller(issue(client, "later", owner="stranger")).cache_scope == after[0]
    client.patch(f"{PATH}/{one['id']}", {"enabled": False})
    assert caller(two).cache_scope == after[0]


def test_emptying_it_again_is_another_emptying(owner: User) -> None:
    client = as_(owner)
    made = issue(client, "desk")
    scopes = set()
    for _ in range(3):
        client.post(f"{PATH}/{made['id']}/empty-cache")
        scopes.add(caller(made).cache_scope)
    assert len(scopes) == 3


def delete(key: GatewayKey, stranger: User) -> None:
    key.delete()


def give_away(key: GatewayKey, stranger: User) -> None:
    key.holder = stranger
    key.save()


@pytest.mark.parametrize("part_with", [delete, give_away])
def test_it_stays_empty_without_the_key_through_which_it_was_emptied(
    owner: User, stranger: User, part_with: Callable[[GatewayKey, User], None]
) -> None:
    client = as_(owner)
    one, two = (issue(client, name, owner="owner") for name in ("one", "two"))
    loose = issue(client, "loose")
    client.post(f"{PATH}/{one['id']}/empty-cache")
    emptied = caller(two).cache_scope

    with changes(actor=None, via="system"):
        part_with(GatewayKey.objects.get(name="one"), stranger)

    assert caller(two).cache_scope == emptied
    # Whoever comes to the owner from now on keeps it in mind, too.
    issue(client, "three", owner="owner")
    client.patch(f"{PATH}/{loose['id']}", {"owner": "owner"})
    with changes(actor=None, via="system"):
        GatewayKey.objects.exclude(name="loose").delete()
    assert caller(loose).cache_scope == emptied


def test_it_stays_empty_when_a_backup_from_before_is_restored(owner: User) -> None:
    keyring.load()
    client = as_(owner)
    one, two = (issue(client, name, owner="owner") for name in ("one", "two"))
    backup = document.build(sealed=True)
    client.post(f"{PATH}/{one['id']}/empty-cache")
    emptied = caller(two).cache_scope
    assert restored(backup).changes == ()
    assert caller(two).cache_scope == emptied
    client.delete(f"{PATH}/{one['id']}")
    restored(backup)
    assert caller(one).cache_scope == caller(two).cache_scope == emptied


def test_when_it_was_emptied_is_not_for_anybody_to_write(owner: User) -> None:
    client = as_(owner)
    made = issue(client, "desk")
    response = client.patch(f"{PATH}/{made['id']}", {"cache_emptied_at": "2026-01-01T00:00:00Z"})
    assert response.status_code == 400


def test_whoever_may_rotate_a_key_may_empty_its_cache(
    owner: User, operator: User, viewer: User, person: Any
) -> None:
    member = person("member", "member")
    mine = issue(as_(owner), "mine", owner="member")
    other = issue(as_(owner), "other", owner="viewer")
    for who, key, status in (
        (operator, mine, 200), (member, mine, 200), (member, other, 404), (viewer, other, 403),
    ):  # fmt: skip
        assert as_(who).post(f"{PATH}/{key['id']}/empty-cache").status_code == status, who


def test_the_page_of_a_key_has_a_button_that_empties_its_cache(owner: User, viewer: User) -> None:
    made = issue(as_(owner), "desk")
    client = Client()
    client.force_login(owner)
    address = reverse("admin:proxy_gatewaykey_empty-cache", args=[made["id"]])
    assert address in client.get(reverse("admin:proxy_gatewaykey_change", args=[made["id"]])).content.decode()
    assert client.get(address).status_code == 200
    assert GatewayKey.objects.get().cache_emptied_at is None
    assert client.post(address).status_code == 302
    assert GatewayKey.objects.get().cache_emptied_at is not None
    client.force_login(viewer)
    assert client.post(address).status_code == 403


def test_the_form_of_a_key_takes_both_and_refuses_nonsense(owner: User) -> None:
    client = Client()
    client.force_login(owner)
    form = {
        "name": "desk",
        "allowed_models": "",
        "allowed_networks": "",
        "cache_seconds": "90",
        "record_text": "on",
    }
    client.post(reverse("admin:proxy_gatewaykey_add"), form)
    key = GatewayKey.objects.get()
    assert (key.cache_seconds, key.record_text) == (90, True)
    page = client.post(reverse("admin:proxy_gatewaykey_add"), {**form, "name": "b", "cache_seconds": "0"})
    assert page.status_code == 200 and GatewayKey.objects.count() == 1


@pytest.mark.parametrize(
    ("trace", "cost"),
    [({"cache": "hit"}, 0), ({"cache": "miss"}, None), ({}, None), (None, None), (["cache", "hit"], None)],
)
def test_a_hit_costs_nothing_and_nothing_else_is_free(trace: Any, cost: int | None) -> None:
    row = usage_row({"id": "0" * 32, "status": "success", "trace": trace})
    assert row is not None and row["cost_nanodollars"] == cost


def test_a_record_from_the_cache_says_so(viewer: User) -> None:
    from tests.proxy.test_admin_usage import card_of, page_of, text_of

    card = text_of(card_of(page_of(viewer, {"candidates": ["box/tiny: taken"], "cache": "hit"})))
    assert "from the cache" in card and "were not kept" not in card and "box/tiny" in card
    assert "from the cache" not in page_of(viewer, {"candidates": [], "cache": "miss", "attempts": []})
