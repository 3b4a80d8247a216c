"""R39, R50: every request that can change something leaves exactly one entry for each thing it changed; none that only reads does."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.urls import URLPattern, get_resolver
from django.urls.resolvers import URLResolver

from audit.changes import changes
from audit.models import Entry, Head
from config import api_v1
from providers.models import Provider
from tests.support.api import KEY, V1, add_key, add_server, as_, template

pytestmark = pytest.mark.django_db
DIALS = ("/test", "/refresh")
"""These ask the provider; nothing of the configuration changes unless it answers."""


@pytest.fixture
def things(owner: User, person: Callable[..., User], settings: Any, tmp_path: Path) -> dict[str, Any]:
    """One thing of each kind that is in nobody's way, and one that is used; nothing listens where they point."""
    settings.TEST_TIMEOUT_SECONDS = 0.5
    client = as_(owner)
    server, used = (
        add_server(client)["id"],
        add_server(client, name="used", use_for_embeddings=True, use_for_reranking=True)["id"],
    )
    client.post(f"{V1}/providers/{server}/models", {"id": "tiny"})
    key = add_key(client)["id"]
    with changes(actor=None, via="system"):
        Provider.objects.filter(slug="openai").update(base_url="https://127.0.0.1:9")
    client.put(f"{V1}/active/chat", {"provider_type": "ai_server", "provider_id": used})
    route = client.post(f"{V1}/model-routes", {"name": "r", "nodes": [{"provider_id": used}]}).json()["id"]
    gateway = client.post(f"{V1}/gateway-keys", {"name": "app"}).json()["id"]
    person("alice", "member")
    limits = client.post(f"{V1}/owner-limits", {"owner": "alice"}).json()["id"]
    override = {
        "provider": "openai",
        "model": "o9",
        "prompt_usd_per_million": "1",
        "completion_usd_per_million": "2",
    }
    price = client.post(f"{V1}/prices", override).json()["id"]
    budget = client.post(f"{V1}/budgets", {"user": "alice", "amount_usd": 5}).json()["id"]
    settings.BACKUP_FILE = tmp_path / "backup.json"
    return {
        "budget": budget,
        "server": server,
        "used": used,
        "key": key,
        "route": route,
        "gateway": gateway,
        "limits": limits,
        "price": price,
    }


def requests(t: dict[str, Any]) -> dict[tuple[str, str], tuple[str, Any, list[str]]]:
    """(method, path as documented) -> address, body, and the actions that must be recorded. In an order that works."""
    box = {"name": "box", "base_url": "http://127.0.0.1:9"}
    target = {"provider_type": "ai_server", "provider_id": t["used"]}
    found: dict[tuple[str, str], tuple[str, Any, list[str]]] = {}
    for what, noun in (("servers", "server"), ("providers", "server")):
        one, models = f"{what}/{t['server']}", f"{what}/{{id}}/models"
        found |= {
            ("post", what): (what, {**box, "name": f"{what} box"}, [f"add_{noun}"]),
            ("patch", f"{what}/{{id}}"): (
                one,
                {"priority": 1 if what == "servers" else 2},
                [f"update_{noun}"],
            ),
            ("put", f"{what}/{{id}}"): (one, {**box, "name": f"put {what}"}, [f"update_{noun}"]),
            ("post", models): (f"{one}/models", {"id": what}, ["add_model"]),
            ("patch", f"{models}/{{model_id}}"): (
                f"{one}/models/{what}",
                {"context_window": 9},
                ["update_model"],
            ),
            ("delete", f"{models}/{{model_id}}"): (f"{one}/models/{what}", None, ["delete_model"]),
            ("post", f"{what}/bulk"): (
                f"{what}/bulk",
                {"action": "disable" if what == "servers" else "enable", "ids": [t["server"]]},
                [f"update_{noun}"],
            ),
            ("post", f"{what}/{{id}}/test"): (f"{one}/test", {}, []),
            ("post", f"{models}/refresh"): (f"{one}/models/refresh", {}, []),
        }
    amounts = {"prompt_usd_per_million": "1", "completion_usd_per_million": "2"}
    found |= {
        ("post", "prices"): ("prices", {"provider": "openai", "model": "gpt-*", **amounts}, ["add_price"]),
        ("post", "prices/{id}/end"): (f"prices/{t['price']}/end", {}, ["update_price"]),
        ("post", "owner-limits"): ("owner-limits", {"owner": "owner"}, ["add_owner_limits"]),
        ("patch", "owner-limits/{id}"): (
            f"owner-limits/{t['limits']}",
            {"max_concurrency": 5},
            ["update_owner_limits"],
        ),
        ("put", "owner-limits/{id}"): (
            f"owner-limits/{t['limits']}",
            {"owner": "alice", "max_concurrency": 7},
            ["update_owner_limits"],
        ),
        ("delete", "owner-limits/{id}"): (f"owner-limits/{t['limits']}", None, ["delete_owner_limits"]),
        ("patch", "providers/{id}/health"): (
            f"providers/{t['server']}/health",
            {"is_healthy": False},
            ["override_server"],
        ),
        ("post", "providers/test-direct"): ("providers/test-direct", box, ["test_server"]),
        ("post", "api-keys"): (
            "api-keys",
            {"provider": "groq", "key_name": "k", "api_key": KEY},
            ["add_key", "update_provider"],
        ),
        ("patch", "api-keys/{id}"): (f"api-keys/{t['key']}", {"weight": 4}, ["update_key"]),
        ("put", "api-keys/{id}"): (
            f"api-keys/{t['key']}",
            {"provider": "openai", "key_name": "new", "api_key": f"{KEY}2"},
            ["update_key"],
        ),
        ("post", "api-keys/{id}/test"): (f"api-keys/{t['key']}/test", {}, []),
        ("post", "api-keys/fingerprint"): ("api-keys/fingerprint", {"api_key": KEY}, []),
        ("post", "api-keys/bulk"): (
            "api-keys/bulk",
            {"action": "disable", "ids": [t["key"]]},
            ["update_key"],
        ),
        ("post", "active"): ("active", {**target, "purpose": "embeddings"}, ["set_active"]),
        ("put", "active/{purpose}"): ("active/reranking", target, ["set_active"]),
        ("patch", "active/{purpose}"): ("active/chat", {"model": "tiny"}, ["set_active"]),
        ("delete", "active/{purpose}"): ("active/reranking", None, ["set_active"]),
        ("post", "model-routes"): ("model-routes", {"name": "q"}, ["add_model_route"]),
        ("patch", "model-routes/{id}"): (
            f"model-routes/{t['route']}",
            {"strategy": "failover"},
            ["update_model_route"],
        ),
        ("put", "model-routes/{id}"): (f"model-routes/{t['route']}", {"name": "s"}, ["update_model_route"]),
        ("post", "model-routes/{id}/select"): (f"model-routes/{t['route']}/select", {}, []),
        ("post", "model-routes/bulk"): (
            "model-routes/bulk",
            {"action": "disable", "ids": [t["route"]]},
            ["update_model_route"],
        ),
        ("post", "gateway-keys"): ("gateway-keys", {"name": "k"}, ["add_gateway_key"]),
        ("patch", "gateway-keys/{id}"): (
            f"gateway-keys/{t['gateway']}",
            {"name": "x"},
            ["update_gateway_key"],
        ),
        ("put", "gateway-keys/{id}"): (f"gateway-keys/{t['gateway']}", {"name": "y"}, ["update_gateway_key"]),
        ("post", "budgets"): ("budgets", {"user": "owner", "amount_usd": 5}, ["add_budget"]),
        ("patch", "budgets/{id}"): (f"budgets/{t['budget']}", {"amount_usd": 7}, ["update_budget"]),
        ("put", "budgets/{id}"): (
            f"budgets/{t['budget']}",
            {"user": "alice", "amount_usd": 8},
            ["update_budget"],
        ),
        ("delete", "budgets/{id}"): (f"budgets/{t['budget']}", None, ["delete_budget"]),
        ("post", "gateway-keys/{id}/empty-cache"): (
            f"gateway-keys/{t['gateway']}/empty-cache",
            {},
            ["update_gateway_key"],
        ),
        ("post", "gateway-keys/{id}/browser-token"): (
            f"gateway-keys/{t['gateway']}/browser-token",
            {},
            ["issue_browser_token"],
        ),
        ("post", "admin/backup"): ("admin/backup", {}, []),
        ("post", "admin/providers/restore"): ("admin/providers/restore", {"format": "penstock/1"}, []),
        ("post", "gateway-keys/{id}/rotate"): (
            f"gateway-keys/{t['gateway']}/rotate",
            {},
            ["update_gateway_key"],
        ),
        ("post", "gateway-keys/bulk"): (
            "gateway-keys/bulk",
            {"action": "disable", "ids": [t["gateway"]]},
            ["update_gateway_key"],
        ),
        ("post", "gateway-keys/{id}/revoke"): (
            f"gateway-keys/{t['gateway']}/revoke",
            {},
            ["update_gateway_key"],
        ),
        ("delete", "gateway-keys/{id}"): (f"gateway-keys/{t['gateway']}", None, ["delete_gateway_key"]),
        ("delete", "model-routes/{id}"): (f"model-routes/{t['route']}", None, ["delete_model_route"]),
        ("delete", "api-keys/{id}"): (f"api-keys/{t['key']}", None, ["delete_key"]),
        ("delete", "servers/{id}"): (f"servers/{t['server']}", None, ["delete_model", "delete_server"]),
        ("delete", "providers/{id}"): ("providers/{extra}", None, ["delete_server"]),
    }
    return found


def mutating_routes() -> set[tuple[str, str]]:
    """What the running application has, not what a page says. Logging in and out is not configuration."""
    found = set()
    for pattern in api_v1.urlpatterns:
        path = template(str(pattern.pattern)).strip("/")
        for method in getattr(pattern.callback, "actions", {}):
            if method not in {"get", "head", "options"}:
                found.add((method, path))
    return found


def test_r50_every_request_that_changes_something_is_recorded_once(
    owner: User, things: dict[str, Any]
) -> None:
    client = as_(owner)
    extra = add_server(client, name="extra")["id"]
    table = requests(things)
    wrong = []
    for (method, path), (address, body, expected) in table.items():
        before = Head.objects.get().seq
        answer = getattr(client, method)(f"{V1}/{address.format(extra=extra)}", body)
        written = list(Entry.objects.filter(seq__gt=before).order_by("seq"))
        actions = sorted(entry.action for entry in written)
        if answer.status_code >= 300 and not path.endswith((*DIALS, "/select")):
            wrong.append(f"{method} {path}: {answer.status_code} {answer.content[:200]!r}")
        elif actions != sorted(expected):
            wrong.append(f"{method} {path}: {actions}")
        elif any(
            (e.username, e.via, e.request_id) != ("owner", "api", answer["x-request-id"]) for e in written
        ):
            wrong.append(f"{method} {path}: not said who")
        elif KEY in str([entry.changes for entry in written]):
            wrong.append(f"{method} {path}: tells the key")
    assert not wrong
    assert mutating_routes() <= set(table), mutating_routes() - set(table)


# -- nothing that is only read changes anything --------------------------------------------------------------------------


SESSION = ("django_session", "axes_", "sqlite_")


def state() -> str:
    """A digest of all rows, but for sessions, which remember that somebody was here."""
    digest = hashlib.sha256()
    with connection.cursor() as cursor:
        for table in sorted(connection.introspection.table_names(cursor)):
            if not table.startswith(SESSION):
                cursor.execute(f"SELECT * FROM {connection.ops.quote_name(table)}")
                digest.update(repr((table, sorted(map(repr, cursor.fetchall())))).encode())
    return digest.hexdigest()


def addresses(patterns: Any = None, prefix: str = "") -> Iterator[str]:
    """Every route of the application, as `/api/v1/servers/{id}`."""
    for pattern in get_resolver().url_patterns if patterns is None else patterns:
        whole = prefix + str(pattern.pattern)
        if isinstance(pattern, URLResolver):
            yield from addresses(pattern.url_patterns, whole)
        elif isinstance(pattern, URLPattern):
            yield whole


def test_r39_no_get_changes_anything(owner: User, things: dict[str, Any]) -> None:
    client = as_(owner)
    ids = {
        "servers": things["server"],
        "providers": things["server"],
        "api-keys": things["key"],
        "model-routes": things["route"],
        "gateway-keys": things["gateway"],
        "owner-limits": things["limits"],
        "prices": things["price"],
        "audit": 1,
    }
    objects = {"object_id": things["server"], "app_label": "providers", "url": "", "content_type_id": 1}
    before, asked = state(), 0
    for route in addresses():
        path = template(route)
        word = next((id for name, id in ids.items() if f"/{name}/" in path), 1)
        path = path.replace("{id}", str(word)).replace("{model_id}", "tiny").replace("{purpose}", "chat")
        for name, value in objects.items():
            path = path.replace(f"<path:{name}>", str(value)).replace(f"<{name}>", str(value))
        if "logout" in path or path.endswith("/admin/backup"):
            continue  # A download of the whole configuration is recorded.
        answer = client.get(path, headers={"Accept": "text/html, application/json"})
        asked += 1
        assert answer.status_code < 500 or answer.status_code in {502, 503}, path
    assert asked > 100
    assert state() == before


def test_r39_a_session_without_the_csrf_token_changes_nothing(owner: User, things: dict[str, Any]) -> None:
    client = as_(owner)
    client.handler.enforce_csrf_checks = True
    before = state()

    for (method, path), (address, body, _) in requests(things).items():
        answer = getattr(client, method)(f"{V1}/{address.format(extra=1)}", body)
        assert answer.status_code == 403, (method, path)

    assert state() == before


@pytest.mark.parametrize(
    "origin", ["https://evil.com", "null", "https://testserver.evil.com", "http://testserver:81"]
)
def test_r39_a_foreign_origin_may_not_read(owner: User, origin: str) -> None:
    answer = as_(owner).get(f"{V1}/servers", headers={"Origin": origin})

    assert "Access-Control-Allow-Origin" not in answer
    assert "Access-Control-Allow-Credentials" not in answer


# -- the admin -----------------------------------------------------------------------------------------------------------


def test_r50_every_action_of_every_list_of_the_admin_is_recorded_or_changes_nothing(
    owner: User, things: dict[str, Any]
) -> None:
    """Each action is run on one row; what differs afterwards must be in the log, by the person who did it."""
    client = as_(owner)
    tried = 0
    for model, page in admin.site._registry.items():
        row: Any = model._default_manager.order_by("pk").last()
        for action in page.get_actions(_request(owner)) if row is not None else ():
            name = f"admin:{model._meta.app_label}_{model._meta.model_name}_changelist"
            before, seq = watched(), Head.objects.get().seq
            body = {"action": action, "_selected_action": [row.pk], "post": "yes"}
            answer = client.post(_reverse(name), body, format="multipart")
            assert answer.status_code < 500, (name, action)
            entries = Entry.objects.filter(seq__gt=seq)
            if watched() != before:
                assert entries, (name, action)
            assert {entry.username for entry in entries} <= {"owner"}, (name, action)
            assert {entry.via for entry in entries} <= {"admin"}, (name, action)
            tried += 1
            if not model._default_manager.filter(pk=row.pk).exists():
                break
    assert tried >= 10


def watched() -> dict[str, Any]:
    """The rows of watched models."""
    from django.apps import apps
    from django.conf import settings

    return {
        label: list(apps.get_model(label)._base_manager.order_by("pk").values())
        for label in settings.AUDIT_WATCH
    }


def _reverse(name: str) -> str:
    from django.urls import reverse

    return reverse(name)


def _request(user: User) -> Any:
    from django.test import RequestFactory

    request = RequestFactory().get("/admin/")
    request.user = user
    return request


# -- commands and fixtures -----------------------------------------------------------------------------------------------


def test_r50_loading_a_fixture_is_recorded(owner: User, tmp_path: Any, things: dict[str, Any]) -> None:
    path = tmp_path / "dump.json"
    call_command("dumpdata", "providers.provider", "--output", str(path))
    as_(owner).patch(f"{V1}/servers/{things['server']}", {"priority": 55})
    seq = Head.objects.get().seq

    call_command("loaddata", str(path), verbosity=0)

    entries = list(Entry.objects.filter(seq__gt=seq))
    assert [(entry.action, entry.via, entry.changes["priority"]) for entry in entries] == [
        ("update_server", "command", [55, 100])
    ]


def test_r50_a_command_is_recorded(things: dict[str, Any], capsys: Callable[..., Any]) -> None:
    seq = Head.objects.get().seq

    call_command("issue_key", "from the shell")

    assert [(entry.action, entry.via) for entry in Entry.objects.filter(seq__gt=seq)] == [
        ("add_gateway_key", "command")
    ]
