"""People and their roles in the admin: who may change whom, and that somebody is always left who can."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from allauth.mfa.models import Authenticator
from django.apps import apps
from django.conf import settings as django_settings
from django.contrib import admin
from django.contrib.auth.models import Group, User
from django.core.management import CommandError, call_command
from django.test import Client

from audit import roles
from audit.admin.base import AuditedAdmin
from audit.admin.versions import row_version
from audit.changes import changes
from audit.models import Entry
from tests.support.codes import enrol

pytestmark = pytest.mark.django_db
PEOPLE = "/admin/auth/user/"
GROUPS = "/admin/auth/group/"
AGAIN = "/admin/account/again/"


@pytest.fixture
def boss(person: Callable[..., User]) -> User:
    return person("boss", "administrator")


def as_(user: User) -> Client:
    django_settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
    client = Client()
    client.force_login(user)
    return client


def as_asked_again(user: User) -> Client:
    """Somebody who has just given his password once more."""
    client = as_(user)
    client.post(AGAIN, {"password": "correct horse battery"})
    return client


def save(client: Client, user: User, *roles: str, **fields: Any) -> Any:
    form = {
        "username": user.username,
        "first_name": "",
        "last_name": "",
        "email": user.email,
        "is_active": "on",
        "groups": [str(Group.objects.get(name=role).pk) for role in roles],
        "row_version": row_version(user),
        **fields,
    }
    wanted = {name: value for name, value in form.items() if value is not None}
    return client.post(f"{PEOPLE}{user.pk}/change/", wanted, follow=True)


def stored(user: User) -> User:
    return User.objects.get(pk=user.pk)


def roles_of(user: User) -> set[str]:
    return set(stored(user).groups.values_list("name", flat=True))


def test_an_administrator_gives_and_takes_roles(boss: User, viewer: User) -> None:
    save(as_(boss), viewer, "operator")

    assert roles_of(viewer) == {"operator"}
    assert Entry.objects.filter(entity_name="viewer", username="boss", via="admin").exists()


@pytest.mark.parametrize("change", [{"is_active": None}, {"groups": []}])
def test_the_last_administrator_cannot_remove_himself(boss: User, change: dict[str, Any]) -> None:
    before = Entry.objects.count()

    answer = save(as_(boss), boss, "administrator", **change)

    assert "nobody would be left" in answer.content.decode()
    assert stored(boss).is_active and roles_of(boss) == {"administrator"}
    assert Entry.objects.count() == before


def test_the_last_administrator_cannot_delete_himself(boss: User) -> None:
    client = as_(boss)
    client.post(f"{PEOPLE}{boss.pk}/delete/", {"post": "yes"})
    client.post(PEOPLE, {"action": "delete_selected", "_selected_action": [boss.pk], "post": "yes"})

    assert stored(boss).is_active


@pytest.mark.parametrize("role", roles.Role)
@pytest.mark.parametrize("who", ["boss", "owner"])
def test_a_role_is_looked_at_and_neither_renamed_emptied_nor_deleted(
    request: pytest.FixtureRequest, who: str, role: str
) -> None:
    client, group = as_(request.getfixturevalue(who)), Group.objects.get(name=role)
    permissions, page = set(group.permissions.all()), f"{GROUPS}{group.pk}/"
    chosen = {"action": "delete_selected", "_selected_action": [group.pk], "post": "yes"}

    assert client.get(f"{page}change/").status_code == 200
    assert client.post(f"{page}change/", {"name": "renamed", "permissions": []}).status_code == 403
    assert client.post(f"{page}delete/", {"post": "yes"}).status_code == 403
    assert client.post(GROUPS, chosen).status_code == 403

    assert set(Group.objects.get(name=role).permissions.all()) == permissions


def test_a_team_is_made_renamed_and_deleted_but_never_a_role(boss: User) -> None:
    client = as_(boss)
    client.post(f"{GROUPS}add/", {"name": "ml", "permissions": []})
    team = Group.objects.get(name="ml")
    page = f"{GROUPS}{team.pk}/"

    assert client.post(f"{page}change/", {"name": "viewer"}).status_code == 200
    assert client.post(f"{page}change/", {"name": "research"}).status_code == 302
    assert Group.objects.get(name="research").pk == team.pk
    assert client.post(f"{page}delete/", {"post": "yes"}).status_code == 302
    assert set(Group.objects.values_list("name", flat=True)) == set(roles.Role)


def test_with_another_one_he_can_and_a_superuser_counts(boss: User, owner: User) -> None:
    save(as_(boss), boss, "viewer")

    assert roles_of(boss) == {"viewer"}


def test_switching_an_administrator_off_ends_his_session(boss: User, person: Callable[..., User]) -> None:
    other = person("other", "administrator")
    theirs = as_(other)
    assert theirs.get("/admin/").status_code == 200

    save(as_(boss), other, "administrator", is_active=None)

    assert theirs.get("/admin/").status_code == 302


# -- somebody else's second factor -------------------------------------------------------------------------------------


def test_an_administrator_removes_the_second_factor_of_somebody_who_lost_it(
    boss: User, operator: User
) -> None:
    enrol(operator)
    client = as_asked_again(boss)
    page = f"{PEOPLE}{operator.pk}/reset-second-factor/"
    assert "reset-second-factor" in client.get(f"{PEOPLE}{operator.pk}/change/").content.decode()

    assert client.get(page).status_code == 200
    assert Authenticator.objects.filter(user=operator).count() == 2
    assert client.post(page).status_code == 302

    assert not Authenticator.objects.exists()
    entry = Entry.objects.filter(action="change_second_factor", username="boss").get()
    assert entry.entity_name == "operator" and set(entry.changes) == {"totp", "recovery_codes"}


def test_nobody_else_does(operator: User, viewer: User, boss: User, owner: User) -> None:
    enrol(viewer)
    enrol(owner)
    assert as_(operator).post(f"{PEOPLE}{viewer.pk}/reset-second-factor/").status_code == 403
    assert as_(boss).post(f"{PEOPLE}{owner.pk}/reset-second-factor/").status_code == 403
    assert Authenticator.objects.count() == 4


@pytest.mark.parametrize("pages", ["reset-second-factor", "password"])
def test_ones_own_has_pages_of_its_own(boss: User, pages: str) -> None:
    enrol(boss)
    client, new = as_asked_again(boss), "a rather long phrase"
    form = {"usable_password": "true", "password1": new, "password2": new}

    for written in (f"{boss.pk}", f"0{boss.pk}"):
        assert client.get(f"{PEOPLE}{written}/{pages}/").status_code == 302
        assert client.post(f"{PEOPLE}{written}/{pages}/", form).status_code == 302

    assert Authenticator.objects.filter(user=boss).count() == 2
    assert stored(boss).check_password("correct horse battery")


def test_an_open_session_alone_takes_nobodys_second_factor(boss: User, operator: User) -> None:
    enrol(operator)
    client, page = as_(boss), f"{PEOPLE}{operator.pk}/reset-second-factor/"

    assert client.get(page)["Location"].startswith(AGAIN)
    asked = client.post(page)["Location"]
    assert asked.startswith(AGAIN)
    assert Authenticator.objects.count() == 2
    client.post(asked, {"password": "correct horse battery"})
    assert not Authenticator.objects.exists()


def test_an_open_session_alone_changes_nobodys_password_and_keeps_no_new_one(
    boss: User, operator: User
) -> None:
    client, page, new = as_(boss), f"{PEOPLE}{operator.pk}/password/", "a rather long phrase"
    form = {"usable_password": "true", "password1": new, "password2": new}

    assert client.post(page, form)["Location"] == page
    assert client.get(page)["Location"].startswith(AGAIN)

    assert new not in repr(dict(client.session))
    assert stored(operator).check_password("correct horse battery")
    client.post(AGAIN, {"password": "correct horse battery"})
    assert client.get(page).status_code == 200
    client.post(page, form)
    assert stored(operator).check_password(new)


def test_a_second_factor_comes_and_goes_on_the_record_or_not_at_all(operator: User) -> None:
    from allauth.mfa.totp.internal.auth import TOTP

    from audit.changes import NotInChanges

    with pytest.raises(NotInChanges):
        TOTP.activate(operator, "JBSWY3DPEHPK3PXP")


def test_somebody_with_a_second_factor_and_tokens_can_be_deleted(boss: User, operator: User) -> None:
    enrol(operator)
    answer = as_(boss).post(f"{PEOPLE}{operator.pk}/delete/", {"post": "yes"})

    assert answer.status_code == 302
    assert not User.objects.filter(pk=operator.pk).exists()


def test_every_page_of_the_admin_is_on_the_houses_base() -> None:
    strangers = [
        type(page).__name__ for page in admin.site._registry.values() if not isinstance(page, AuditedAdmin)
    ]

    assert strangers == []


def test_what_packages_keep_has_no_page() -> None:
    ours = {"audit", "providers", "proxy", "auth"}
    shown = {model._meta.app_label for model in admin.site._registry}

    assert shown <= ours
    assert {"account", "mfa", "socialaccount", "token_blacklist"} <= {
        app.label for app in apps.get_app_configs()
    }


def test_a_user_can_be_made(boss: User) -> None:
    form = {
        "username": "new",
        "password1": "a rather long phrase",
        "password2": "a rather long phrase",
        "usable_password": "true",
    }
    as_(boss).post(f"{PEOPLE}add/", form)

    assert User.objects.get(username="new").check_password("a rather long phrase")
    with changes(actor=None, via="system"):
        User.objects.get(username="new").delete()


def test_the_command_helps_an_administrator_who_is_alone(
    boss: User, capsys: pytest.CaptureFixture[str]
) -> None:
    enrol(boss)
    call_command("reset_second_factor", "boss")

    assert "removed 2 of boss" in capsys.readouterr().out
    assert not Authenticator.objects.exists()
    assert Entry.objects.filter(action="change_second_factor", via="command", entity_name="boss").count() == 1
    with pytest.raises(CommandError):
        call_command("reset_second_factor", "nobody")
