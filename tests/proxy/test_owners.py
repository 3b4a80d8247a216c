"""Whose a key is, and what all keys of one owner may do together: through the API, in the admin, and as requests see it."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.db import IntegrityError, transaction
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry
from audit.roles import Role
from providers.wire import Quota
from proxy import keys, owners
from proxy.models import GatewayKey, GatewayKeyUse, OwnerLimits
from proxy.snapshot import build
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db
KEYS, LIMITS = f"{V1}/gateway-keys", f"{V1}/owner-limits"


@pytest.fixture
def team(db: None) -> Group:
    with changes(actor=None, via="system"):
        return Group.objects.create(name="ml")


@pytest.fixture
def mia(person: Callable[..., User], team: Group) -> User:
    """A member of the team."""
    mia = person("mia", "member")
    with changes(actor=None, via="system"):
        mia.groups.add(team)
    return mia


def key_of(holder: Any, name: str = "app", **fields: Any) -> GatewayKey:
    with changes(actor=None, via="system"):
        key = GatewayKey(name=name, holder=holder, **fields)
        keys.give_secret(key)
        key.full_clean()
        key.save()
    return key


def limit(holder: Any, **limits: int) -> OwnerLimits:
    with changes(actor=None, via="system"):
        return OwnerLimits.objects.create(holder=holder, **limits)


# -- whose it is -------------------------------------------------------------------------------------------------------


def test_a_key_of_a_team_is_written_so_everywhere(operator: User, team: Group) -> None:
    client = as_(operator)
    response = client.post(KEYS, {"name": "app", "owner": "team:ml"})
    assert response.status_code == 201, response.content
    made = response.json()
    assert made["owner"] == "team:ml"
    assert client.get(f"{KEYS}/{made['id']}").json()["owner"] == "team:ml"
    assert client.get(f"{KEYS}?team__name=ml").json()["count"] == 1
    assert client.get(f"{KEYS}?search=ml").json()["count"] == 1
    caller = build().callers[GatewayKey.objects.get().key_id]
    assert (caller.owner, caller.user_id, caller.team_id) == ("team:ml", None, team.pk)
    assert Entry.objects.get(action="add_gateway_key").changes["team"] == [None, team.pk]


def test_a_key_of_a_user_and_one_of_nobody(stranger: User) -> None:
    his, nobodys = key_of(stranger, "his"), key_of(None, "nobody's")
    callers = build().callers
    found = [
        (each.owner, each.user_id, each.team_id) for each in (callers[his.key_id], callers[nobodys.key_id])
    ]
    assert found == [("stranger", stranger.pk, None), ("", None, None)]


def test_an_administrator_gives_a_key_to_another_owner(owner: User, stranger: User, team: Group) -> None:
    client, key = as_(owner), key_of(stranger)
    for text in ("team:ml", "stranger", None):
        assert client.patch(f"{KEYS}/{key.pk}", {"owner": text}).json()["owner"] == text
    assert client.patch(f"{KEYS}/{key.pk}", {"owner": stranger.pk}).json()["owner"] == "stranger"


@pytest.mark.parametrize("wrong", ["team:nobody", "team:", "team:ML", "ml", "team: ml", 0, [], {}])
def test_what_names_no_user_and_no_team_is_400(operator: User, team: Group, wrong: object) -> None:
    response = as_(operator).post(KEYS, {"name": "app", "owner": wrong})
    assert response.status_code == 400
    assert set(error(response)["details"]) == {"owner"}


@pytest.mark.parametrize("role", list(Role))
def test_a_role_is_no_team(operator: User, role: str) -> None:
    assert as_(operator).post(KEYS, {"name": "app", "owner": f"team:{role}"}).status_code == 400
    with pytest.raises(ValidationError, match="team"):
        key_of(Group.objects.get(name=role))


def test_a_user_whose_name_looks_like_a_team_is_not_taken_for_one(
    person: Callable[..., User], team: Group
) -> None:
    """The forms allow no such name; a script might make one."""
    person("team:ml")
    assert owners.find("team:ml") == team


def test_the_database_knows_no_key_with_two_owners(stranger: User, team: Group) -> None:
    key = key_of(stranger)
    with pytest.raises(IntegrityError), transaction.atomic():
        GatewayKey.objects.filter(pk=key.pk).update(team=team)


def test_a_key_is_issued_to_a_team_from_the_command_line(team: Group) -> None:
    call_command("issue_key", "cron", "--owner", "team:ml", stdout=StringIO())
    assert GatewayKey.objects.get().team == team


# -- what a member sees ------------------------------------------------------------------------------------------------


def test_a_member_has_the_keys_of_his_teams_and_no_others(mia: User, team: Group, stranger: User) -> None:
    with changes(actor=None, via="system"):
        other = Group.objects.create(name="ops")
    ours, hers = key_of(team, "ours"), key_of(mia, "hers")
    foreign = [key_of(other, "theirs"), key_of(stranger, "his"), key_of(None, "nobody's")]
    client = as_(mia)

    assert {row["name"] for row in client.get(KEYS).json()["results"]} == {"ours", "hers"}
    for mine in (ours, hers):
        assert client.get(f"{KEYS}/{mine.pk}").status_code == 200
        assert keys.parse(client.post(f"{KEYS}/{mine.pk}/rotate").json()["key"]) is not None
        assert client.patch(f"{KEYS}/{mine.pk}", {"name": "x"}).status_code == 403
        assert client.delete(f"{KEYS}/{mine.pk}").status_code == 403
        assert client.post(f"{KEYS}/{mine.pk}/revoke").json()["enabled"] is False
    for key in foreign:
        for response in (
            client.get(f"{KEYS}/{key.pk}"),
            client.post(f"{KEYS}/{key.pk}/rotate"),
            client.post(f"{KEYS}/{key.pk}/revoke"),
        ):
            assert response.status_code == 404
            assert error(response)["code"] == "NOT_FOUND"
    assert GatewayKey.objects.filter(revoked_at=None).count() == 3


def test_who_leaves_a_team_no_longer_sees_its_keys_and_they_go_on(mia: User, team: Group) -> None:
    key = key_of(team)
    with changes(actor=None, via="system"):
        mia.groups.remove(team)
    assert as_(mia).get(f"{KEYS}/{key.pk}").status_code == 404
    assert key.key_id in build().callers


def test_a_role_that_got_a_key_past_the_forms_shows_it_to_nobody(mia: User) -> None:
    key = key_of(None)
    GatewayKey.objects.filter(pk=key.pk).update(team=Group.objects.get(name="member"))
    assert as_(mia).get(KEYS).json()["count"] == 0


# -- how it ends -------------------------------------------------------------------------------------------------------


def test_r15_a_key_ends_with_its_owner_and_the_configuration_says_so(
    mia: User, team: Group, stranger: User
) -> None:
    ours, hers, his = key_of(team, "ours"), key_of(mia, "hers"), key_of(stranger, "his")
    assert len(build().callers) == 3

    def after(change: Callable[[], Any]) -> set[str]:
        before = build().version
        with changes(actor=None, via="system"):
            change()
        snapshot = build()
        assert snapshot.version > before  # which is what tells the workers
        return {caller.name for caller in snapshot.callers.values()}

    def disable() -> None:
        mia.is_active = False
        mia.save()

    assert after(disable) == {"ours", "his"}
    assert not GatewayKey.objects.get(pk=hers.pk).usable
    assert after(stranger.delete) == {"ours"}
    assert after(team.delete) == set()
    assert not GatewayKey.objects.filter(pk__in=[ours.pk, his.pk]).exists()
    deleted = Entry.objects.filter(action="delete_gateway_key").values_list("entity_name", flat=True)
    assert set(deleted) == {"ours", "his"}


def test_an_administrator_deletes_a_team_whose_key_was_used(person: Callable[..., User], team: Group) -> None:
    """Nobody has a permission to delete the counts of use, and nobody needs one."""
    GatewayKeyUse.objects.create(gateway_key=key_of(team), requests_count=7)
    limit(team, requests_per_minute=5)
    client = Client()
    client.force_login(person("ada", "administrator"))
    address = reverse("admin:auth_group_delete", args=[team.pk])
    assert "app" in client.get(address).content.decode()
    assert client.post(address, {"post": "yes"}).status_code == 302
    assert not GatewayKey.objects.exists() and not OwnerLimits.objects.exists()


# -- limits that an owner's keys share ---------------------------------------------------------------------------------


def test_the_limits_of_an_owner_reach_the_requests_of_all_his_keys(
    stranger: User, team: Group, mia: User
) -> None:
    limit(team, requests_per_minute=60, max_concurrency=5)
    limit(mia, tokens_per_minute=1000)
    made = [
        key_of(team, "a", requests_per_minute=10),
        key_of(team, "b"),
        key_of(mia, "c"),
        key_of(stranger, "d"),
    ]
    callers = [build().callers[key.key_id] for key in made]
    assert [caller.owner_quota for caller in callers] == [
        Quota(60, None, 5), Quota(60, None, 5), Quota(None, 1000), None,
    ]  # fmt: skip
    names = [[scope.name for scope in caller.scopes.each] if caller.scopes else [] for caller in callers]
    assert names == [[made[0].key_id, f"team:{team.pk}"], [f"team:{team.pk}"], [f"user:{mia.pk}"], []]


def test_limits_of_owners_are_made_changed_and_removed_through_the_api(
    owner: User, viewer: User, team: Group
) -> None:
    client = as_(owner)
    response = client.post(LIMITS, {"owner": "team:ml", "requests_per_minute": 60})
    assert response.status_code == 201, response.content
    made = response.json()
    assert (made["owner"], made["tokens_per_minute"], made["created_by"]) == ("team:ml", None, "owner")
    path = f"{LIMITS}/{made['id']}"
    assert client.patch(path, {"tokens_per_minute": 500}).json()["tokens_per_minute"] == 500
    assert client.patch(path, {"owner": "team:ml", "max_concurrency": 3}).status_code == 200
    assert client.patch(path, {"max_concurrency": 4}, headers={"If-Match": '"1"'}).status_code == 412
    assert as_(viewer).get(path).json()["max_concurrency"] == 3
    assert Entry.objects.filter(action="update_owner_limits", entity_name="team:ml").count() == 2
    assert client.delete(path).status_code == 204
    assert not OwnerLimits.objects.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("owner", None), ("owner", "nobody"), ("owner", "team:viewer"), ("owner", "team:ml"), ("requests_per_minute", 0),
        ("tokens_per_minute", 10**12), ("max_concurrency", "many"), ("colour", 1),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(
    owner: User, team: Group, field: str, value: object
) -> None:
    limit(team, requests_per_minute=60)  # which is why team:ml cannot have others
    response = as_(owner).post(LIMITS, {"owner": "owner", field: value})
    assert response.status_code == 400, response.content
    assert set(error(response)["details"]) == {field}
    assert OwnerLimits.objects.count() == 1


def test_limits_stay_with_their_owner(owner: User, team: Group) -> None:
    limits = limit(team, requests_per_minute=60)
    response = as_(owner).patch(f"{LIMITS}/{limits.pk}", {"owner": "owner"})
    assert set(error(response)["details"]) == {"owner"}
    with pytest.raises(IntegrityError), transaction.atomic():
        OwnerLimits.objects.filter(pk=limits.pk).update(team=None)
    with pytest.raises(IntegrityError), transaction.atomic():
        OwnerLimits.objects.filter(pk=limits.pk).update(owner=owner)


# -- in the admin ------------------------------------------------------------------------------------------------------


def test_the_form_of_a_key_offers_users_and_teams_and_shows_what_it_inherits(
    owner: User, team: Group
) -> None:
    client = Client()
    client.force_login(owner)
    add = reverse("admin:proxy_gatewaykey_add")
    form = client.get(add).context["adminform"].form
    assert [str(choice) for _, choice in form.fields["team"].choices][1:] == ["ml"]
    both = client.post(add, {"name": "app", "owner": owner.pk, "team": team.pk})
    assert "not to both" in both.content.decode()
    assert client.post(add, {"name": "app", "team": team.pk}).status_code == 200
    key = GatewayKey.objects.get()
    assert (key.team, key.owner) == (team, None)

    change = reverse("admin:proxy_gatewaykey_change", args=[key.pk])
    assert "team:ml has no limits" in client.get(change).content.decode()
    limits = limit(team, requests_per_minute=60, max_concurrency=5)
    page = client.get(change).content.decode()
    assert "60 requests per minute, 5 requests at the same time" in page
    assert reverse("admin:proxy_ownerlimits_change", args=[limits.pk]) in page
    assert "team:ml" in client.get(reverse("admin:proxy_gatewaykey_changelist")).content.decode()


def test_limits_of_an_owner_are_set_in_the_admin(owner: User, viewer: User, team: Group) -> None:
    client = Client()
    client.force_login(owner)
    add = reverse("admin:proxy_ownerlimits_add")
    assert "user or a team" in client.post(add, {"requests_per_minute": 5}).content.decode()
    assert client.post(add, {"team": team.pk, "requests_per_minute": 5}).status_code == 302
    limits = OwnerLimits.objects.get()
    change = reverse("admin:proxy_ownerlimits_change", args=[limits.pk])
    assert client.post(change, {"owner": owner.pk, "tokens_per_minute": 7}).status_code == 302
    limits.refresh_from_db()
    assert (limits.holder, limits.quota()) == (team, Quota(None, 7))
    assert "team:ml" in client.get(reverse("admin:proxy_ownerlimits_changelist")).content.decode()
    looks = Client()
    looks.force_login(viewer)
    assert looks.get(change).status_code == 200
    assert looks.post(change, {"tokens_per_minute": 8}).status_code == 403
