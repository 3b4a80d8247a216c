"""The four roles: what each may do through the API, and the same table as Django permissions for the admin.

MATRIX is the contract. It is compared with the live URL conf, so a new path is denied a merge until it has a line here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Group, User
from django.core.management import call_command
from django.db import transaction
from django.urls import URLResolver, get_resolver

from audit import roles
from audit.access import urls as access_urls
from audit.changes import changes
from audit.models import Entry, Head
from config import api_v1
from providers.models import ApiKey, Provider
from proxy import keys
from proxy.models import GatewayKey
from tests.support.api import V1, add_key, add_server, anybody, as_, template

pytestmark = pytest.mark.django_db
WHO = ("nobody", "stranger", "member", "viewer", "operator", "administrator", "superuser")
READ, WRITE, ADMIN = "vOAS", "OAS", "AS"
"""Who may: v viewer, O operator, A administrator, S superuser; m member, of what is his own."""
LOGGED_IN = "sm" + READ
OPEN = "n" + LOGGED_IN
"""s: somebody without a role; n: nobody, not even logged in."""

MATRIX: list[tuple[str, str, str]] = [
    ("get", "servers", READ),
    ("post", "servers", WRITE),
    ("get", "servers/{server}", READ),
    ("put", "servers/{server}", WRITE),
    ("patch", "servers/{server}", WRITE),
    ("delete", "servers/{server}", WRITE),
    ("post", "servers/{server}/test", WRITE),
    ("get", "servers/{server}/models", READ),
    ("post", "servers/{server}/models", WRITE),
    ("get", "servers/{server}/models/{model}", READ),
    ("patch", "servers/{server}/models/{model}", WRITE),
    ("delete", "servers/{server}/models/{model}", WRITE),
    ("post", "servers/bulk", WRITE),
    ("post", "servers/{server}/models/refresh", WRITE),
    ("get", "providers", READ),
    ("post", "providers", WRITE),
    ("get", "providers/{server}", READ),
    ("put", "providers/{server}", WRITE),
    ("patch", "providers/{server}", WRITE),
    ("delete", "providers/{server}", WRITE),
    ("post", "providers/{server}/test", WRITE),
    ("post", "providers/test-direct", WRITE),
    ("get", "providers/{server}/models", READ),
    ("post", "providers/{server}/models", WRITE),
    ("get", "providers/{server}/models/{model}", READ),
    ("patch", "providers/{server}/models/{model}", WRITE),
    ("delete", "providers/{server}/models/{model}", WRITE),
    ("post", "providers/bulk", WRITE),
    ("post", "providers/{server}/models/refresh", WRITE),
    ("get", "providers/{server}/health", READ),
    ("patch", "providers/{server}/health", WRITE),
    ("get", "api-keys", READ),
    ("post", "api-keys", WRITE),
    ("get", "api-keys/{key}", READ),
    ("put", "api-keys/{key}", WRITE),
    ("patch", "api-keys/{key}", WRITE),
    ("delete", "api-keys/{key}", ADMIN),
    ("post", "api-keys/{key}/test", WRITE),
    ("post", "api-keys/fingerprint", WRITE),
    ("post", "api-keys/bulk", ADMIN),
    ("get", "active", READ),
    ("post", "active", WRITE),
    ("get", "active/{purpose}", READ),
    ("put", "active/{purpose}", WRITE),
    ("patch", "active/{purpose}", WRITE),
    ("delete", "active/{purpose}", WRITE),
    ("get", "model-routes", READ),
    ("post", "model-routes", WRITE),
    ("get", "model-routes/{route}", READ),
    ("put", "model-routes/{route}", WRITE),
    ("patch", "model-routes/{route}", WRITE),
    ("delete", "model-routes/{route}", WRITE),
    ("post", "model-routes/{route}/select", WRITE),
    ("get", "model-routes/{route}/state", READ),
    ("post", "model-routes/bulk", WRITE),
    ("get", "prices", READ),
    ("post", "prices", WRITE),
    ("get", "prices/{price}", READ),
    ("post", "prices/{price}/end", WRITE),
    ("get", "budgets", "m" + READ),
    ("post", "budgets", ADMIN),
    ("get", "budgets/{budget}", "m" + READ),
    ("put", "budgets/{budget}", ADMIN),
    ("patch", "budgets/{budget}", ADMIN),
    ("delete", "budgets/{budget}", ADMIN),
    ("get", "gateway-keys", "m" + READ),
    ("post", "gateway-keys", WRITE),
    ("get", "gateway-keys/{gateway}", "m" + READ),
    ("put", "gateway-keys/{gateway}", ADMIN),
    ("patch", "gateway-keys/{gateway}", ADMIN),
    ("delete", "gateway-keys/{gateway}", ADMIN),
    ("post", "gateway-keys/{gateway}/revoke", "m" + WRITE),
    ("post", "gateway-keys/{gateway}/rotate", "m" + WRITE),
    ("post", "gateway-keys/{gateway}/empty-cache", "m" + WRITE),
    ("post", "gateway-keys/bulk", ADMIN),
    ("get", "audit", WRITE),
    ("get", "audit/{entry}", WRITE),
    ("get", "audit/verify", WRITE),
    ("get", "admin/stats", READ),
    ("get", "admin/logs", ADMIN),
    ("get", "admin/backup", ADMIN),
    ("post", "admin/backup", ADMIN),
    ("post", "admin/providers/restore", ADMIN),
    ("get", "owner-limits", READ),
    ("post", "owner-limits", ADMIN),
    ("get", "owner-limits/{limits}", READ),
    ("put", "owner-limits/{limits}", ADMIN),
    ("patch", "owner-limits/{limits}", ADMIN),
    ("delete", "owner-limits/{limits}", ADMIN),
    ("get", "usage", "m" + READ),
    ("get", "usage/summary", "m" + READ),
    ("get", "usage/{usage}", "m" + READ),
    ("post", "gateway-keys/{gateway}/browser-token", "m" + WRITE),
    ("get", "health", OPEN),
    ("post", "auth/token", OPEN),
    ("post", "auth/token/refresh", OPEN),
    ("post", "auth/token/revoke", OPEN),
    ("get", "schema", LOGGED_IN),
    ("get", "docs", LOGGED_IN),
]
"""(method, path below /api/v1, who may). `{name}` is the thing of that name in `things`."""
RECORD = "01990000-0000-7000-8000-000000000001"
LETTERS = {
    "nobody": "n", "stranger": "s", "member": "m", "viewer": "v", "operator": "O", "administrator": "A", "superuser": "S",
}  # fmt: skip
PLACEHOLDERS = {
    "servers": "{server}",
    "providers": "{server}",
    "api-keys": "{key}",
    "active": "{purpose}",
    "model-routes": "{route}",
    "gateway-keys": "{gateway}",
    "audit": "{entry}",
    "prices": "{price}",
    "owner-limits": "{limits}",
    "usage": "{usage}",
    "budgets": "{budget}",
}
"""First part of a path -> the thing whose id stands in it."""
MOUNTS = ("api/v1/llm-config/", "api/v1/", "api/")
ELSEWHERE = {"", "admin", "admin/", "ping", "api"}
"""What the URL conf has besides: the start page, the admin (see below), /ping, and the answer to what there is not."""


@pytest.fixture
def people(person: Callable[..., User]) -> dict[str, User]:
    made = {role: person(f"the-{role}", role) for role in ("member", "viewer", "operator", "administrator")}
    return {**made, "stranger": person("the-stranger"), "superuser": person("root", is_superuser=True)}


@pytest.fixture
def things(people: dict[str, User]) -> dict[str, Any]:
    """The ids of one thing of each kind; nothing listens where they point."""
    client = as_(people["superuser"])
    server = add_server(client)["id"]
    client.put(f"{V1}/active/chat", {"provider_type": "ai_server", "provider_id": server})
    key = add_key(client)["id"]
    with changes(actor=None, via="system"):
        # A vendor's address on a closed loopback port, so that a test of the key dials nobody.
        Provider.objects.filter(slug="openai").update(base_url="https://127.0.0.1:9")
    gateway = client.post(f"{V1}/gateway-keys", {"name": "app", "owner": "the-member"}).json()["id"]
    route = client.post(f"{V1}/model-routes", {"name": "fast", "nodes": [{"provider_id": server}]}).json()[
        "id"
    ]
    client.post(f"{V1}/servers/{server}/models", {"id": "meta/tiny"})
    override = {
        "provider": "openai",
        "model": "gpt-*",
        "prompt_usd_per_million": "1",
        "completion_usd_per_million": "2",
    }
    price = client.post(f"{V1}/prices", override).json()["id"]
    limits = client.post(f"{V1}/owner-limits", {"owner": "the-member"}).json()["id"]
    return {
        "server": server, "key": key, "gateway": gateway, "purpose": "chat", "route": route, "price": price,
        "limits": limits, "usage": RECORD, "model": "meta/tiny", "entry": 1,
        "budget": client.post(f"{V1}/budgets", {"provider": "openai", "amount_usd": 1}).json()["id"],
    }  # fmt: skip


def test_the_matrix(people: dict[str, User], things: dict[str, Any]) -> None:
    """Denied is 401 or 403; what comes after the gate (400, 404, 409, ...) is not its business."""
    clients = {who: anybody() if who == "nobody" else as_(people[who]) for who in WHO}
    wrong = []
    for method, path, allowed in MATRIX:
        for who, client in clients.items():
            status = _status(client, method, f"{V1}/{path.format(**things)}")
            expected = LETTERS[who] in allowed
            denied = {401} if who == "nobody" else {403}
            if (status not in {401, 403}) is not expected or (not expected and status not in denied):
                wrong.append(f"{who} {method} {path}: {status}")
    assert not wrong


def _status(client: Any, method: str, path: str) -> int:
    """The answer's status; what the request did is undone, so that each finds the same things."""
    with transaction.atomic():
        status = int(
            getattr(client, method)(path, **({} if method in {"get", "delete"} else {"data": {}})).status_code
        )
        transaction.set_rollback(True)
    return status


def test_a_key_of_the_data_plane_opens_nothing_here(people: dict[str, User], things: dict[str, Any]) -> None:
    """R16: neither a gateway key nor a browser token, whoever owns it."""
    with changes(actor=None, via="system"):
        key = GatewayKey(name="of an administrator", owner=people["superuser"])
        whole = keys.give_secret(key)
        key.save()
    token, _ = keys.browser_token(key)
    wrong = []
    for method, path, allowed in MATRIX:
        for bearer in (whole, token):
            client = anybody(headers={"Authorization": f"Bearer {bearer}"})
            status = _status(client, method, f"{V1}/{path.format(**things)}")
            if allowed != OPEN and status != 401:
                wrong.append(f"{method} {path}: {status}")
    assert not wrong


def test_what_belongs_to_somebody_else_is_not_there(
    things: dict[str, Any], person: Callable[..., User]
) -> None:
    """R49: a member gets 404, not 403, for what he may do with his own."""
    client = as_(person("another", "member"))
    for method, path, allowed in MATRIX:
        if "m" in allowed and "{" in path and allowed != OPEN:
            assert _status(client, method, f"{V1}/{path.format(**things)}") == 404, f"{method} {path}"


def test_the_matrix_has_every_route() -> None:
    known = {(method, path) for method, path, _ in MATRIX}
    found = set(_routes(get_resolver()))

    missing = [f'    ("{method}", "{path}", ...),' for method, path in sorted(found - known)]
    assert not missing, "add to MATRIX, with who may according to contract 2.2:\n" + "\n".join(missing)
    gone = [f'    ("{method}", "{path}", ...),' for method, path in sorted(known - found)]
    assert not gone, "remove from MATRIX what the URL conf no longer has:\n" + "\n".join(gone)


def _routes(resolver: URLResolver) -> Iterator[tuple[str, str]]:
    """(method, path) of all that Django answers below /api/v1, as the matrix writes it; nothing may be mounted elsewhere."""
    for pattern in resolver.url_patterns:
        start = str(pattern.pattern)
        if isinstance(pattern, URLResolver) and start in MOUNTS:
            assert pattern.urlconf_name is api_v1, f"{start} leads to other paths than the other mounts"
            if start == "api/v1/":
                for each in pattern.url_patterns:
                    yield from _methods(each, _written(each))
        elif start.startswith("^api/(?:v1/)?"):
            yield from _methods(pattern, _written(pattern).removeprefix("api/"))
        else:
            plain = start.strip("^$").removesuffix("/?").partition("(")[0]
            assert plain in ELSEWHERE or plain.startswith("admin/account/"), (
                f"where is {start} in the matrix?"
            )


def _written(pattern: Any) -> str:
    text = template(str(pattern.pattern)).strip("/")
    head = text.partition("/")[0]
    own = PLACEHOLDERS.get(head, "{" + head + "}")
    return text.replace("{model_id}", "{model}").replace("{id}", own).replace("{purpose}", own)


def _methods(pattern: Any, path: str) -> Iterator[tuple[str, str]]:
    view: Any = getattr(pattern.callback, "cls", None) or getattr(pattern.callback, "view_class", None)
    offered = getattr(pattern.callback, "actions", None) or [
        name for name in view.http_method_names if hasattr(view, name)
    ]
    for method in set(offered) - {"head", "options"}:
        yield method, path


# -- the admin ---------------------------------------------------------------------------------------------------------

WITHOUT_LOGIN = {"login/", "logout/", "jsi18n/"}
"""Pages of the admin that answer to anybody; the script of texts tells nothing."""


def _pages(patterns: Any, start: str = "") -> Iterator[str]:
    for pattern in patterns:
        text = re.sub(r"<[^>]+>", "1", start + str(pattern.pattern))
        if isinstance(pattern, URLResolver):
            yield from _pages(pattern.url_patterns, text)
        else:
            yield text


@pytest.mark.parametrize("who", ["nobody", "stranger", "member"])
@pytest.mark.parametrize("method", ["get", "post"])
def test_no_page_of_the_admin_opens_without_a_staff_role(
    people: dict[str, User], who: str, method: str
) -> None:
    client = anybody() if who == "nobody" else as_(people[who])
    opened = []
    for page in (*_pages(admin.site.get_urls()), *_pages(access_urls.urlpatterns, "account/")):
        if "(" in page or page in WITHOUT_LOGIN or page == "account/logout/":
            continue
        response = getattr(client, method)(f"/admin/{page}")
        away = response.status_code == 302 and "/login/" in response["Location"]
        again = page == "account/code/" and response.status_code == 302
        if not (away or again or response.status_code == 403):
            opened.append(f"{page}: {response.status_code}")
    assert not opened


def test_what_is_not_in_the_table_is_denied(people: dict[str, User]) -> None:
    for user in people.values():
        assert not roles.may(user, "nothing", "read")
        assert not roles.may(user, "providers", "")
    assert not roles.may(people["operator"], "api_keys", "delete")
    assert not roles.may(people["operator"], "allow_private", "change")
    assert roles.may(people["administrator"], "allow_private", "change")


@pytest.mark.parametrize("what", ["key", "budget"])
def test_nobody_deletes_with_a_provider_what_he_may_not_delete(
    people: dict[str, User], things: dict[str, Any], what: str
) -> None:
    operator, administrator = as_(people["operator"]), as_(people["administrator"])
    path = {"key": f"{V1}/api-keys/{things['key']}", "budget": f"{V1}/budgets/{things['budget']}"}
    provider = Provider.objects.get(slug="openai")
    other = path["budget" if what == "key" else "key"]
    assert administrator.delete(other).status_code == 204

    assert operator.delete(f"{V1}/providers/{provider.pk}").status_code == 403
    gone = {"action": "delete", "ids": [provider.pk]}
    assert operator.post(f"{V1}/providers/bulk", gone).status_code == 403
    assert administrator.get(path[what]).status_code == 200

    assert administrator.delete(path[what]).status_code == 204
    assert operator.delete(f"{V1}/providers/{provider.pk}").status_code == 204


def test_an_administrator_deletes_a_provider_with_all_that_is_its_own(
    people: dict[str, User], things: dict[str, Any]
) -> None:
    provider = Provider.objects.get(slug="openai")
    assert as_(people["administrator"]).delete(f"{V1}/providers/{provider.pk}").status_code == 204
    assert not ApiKey.objects.filter(pk=things["key"]).exists()


@pytest.mark.parametrize(("who", "enabled"), [("operator", False), ("administrator", True)])
def test_a_new_secret_enables_a_key_for_those_who_may(
    people: dict[str, User], things: dict[str, Any], who: str, enabled: bool
) -> None:
    off = {"enabled": False, "is_default": True}
    assert as_(people["administrator"]).patch(f"{V1}/api-keys/{things['key']}", off).status_code == 200
    provider, secret = Provider.objects.get(slug="openai"), "sk-another-0123456789"
    answer = as_(people[who]).patch(f"{V1}/providers/{provider.pk}", {"api_key": secret})
    assert answer.status_code == 200
    key = ApiKey.objects.get(pk=things["key"])
    assert (key.last4, key.enabled) == (secret[-4:], enabled)


def test_an_inactive_user_has_no_role(people: dict[str, User]) -> None:
    people["superuser"].is_active = False

    assert roles.roles_of(people["superuser"]) == frozenset()


# -- the admin's side --------------------------------------------------------------------------------------------------


def test_migrate_makes_the_groups_and_gives_them_the_tables_permissions() -> None:
    def of(role: str) -> set[str]:
        group = Group.objects.get(name=role)
        return {
            f"{app}.{name}"
            for app, name in group.permissions.values_list("content_type__app_label", "codename")
        }

    viewer, operator, administrator = of("viewer"), of("operator"), of("administrator")

    assert all(name.split(".")[1].startswith("view_") for name in viewer)
    assert {
        "providers.view_provider",
        "providers.view_server",
        "providers.view_apikey",
        "proxy.view_gatewaykey",
        "proxy.view_modelroute",
        "proxy.view_routenode",
    } <= viewer
    assert "audit.view_entry" not in viewer
    assert {
        "providers.delete_provider",
        "providers.add_apikey",
        "providers.change_apikey",
        "proxy.change_modelroute",
        "proxy.delete_routenode",
        "audit.view_entry",
    } <= operator
    assert not {"providers.delete_apikey", "proxy.delete_gatewaykey", "auth.view_user"} & operator
    assert {
        "auth.add_user",
        "auth.change_group",
        "providers.delete_apikey",
        "proxy.delete_gatewaykey",
    } <= administrator
    for name in (
        "audit.change_entry",
        "audit.delete_entry",
        "proxy.delete_usagerecord",
        "providers.change_keyring",
    ):
        assert name not in administrator
    assert of("member") == set()


def test_assigning_again_changes_nothing(db: None) -> None:
    roles.assign_permissions()
    before = Head.objects.get().seq

    roles.assign_permissions()

    assert Head.objects.get().seq == before


def test_a_permission_that_was_taken_away_comes_back_with_the_next_migrate(db: None) -> None:
    with changes(actor=None, via="system"):
        Group.objects.get(name="viewer").permissions.clear()

    call_command("migrate", verbosity=0)

    assert Group.objects.get(name="viewer").permissions.filter(codename="view_provider").exists()
    assert Entry.objects.filter(action="update_group", entity_name="viewer", via="system").exists()


def test_a_staff_role_lets_into_the_admin_and_losing_the_last_ends_that(stranger: User) -> None:
    viewer, operator, member = (Group.objects.get(name=name) for name in ("viewer", "operator", "member"))

    def staff() -> bool:
        return User.objects.get(pk=stranger.pk).is_staff

    with changes(actor=None, via="system"):
        stranger.groups.add(member)
        assert staff() is False
        stranger.groups.add(viewer, operator)
        assert staff() is True
        stranger.groups.remove(viewer)
        assert staff() is True
        operator.user_set.remove(stranger)
        assert staff() is False
        viewer.user_set.add(stranger)
        assert staff() is True
        stranger.groups.clear()
    assert staff() is False


def test_a_superuser_stays_staff(owner: User) -> None:
    with changes(actor=None, via="system"):
        owner.groups.add(Group.objects.get(name="viewer"))
        owner.groups.clear()

    assert User.objects.get(pk=owner.pk).is_staff is True
