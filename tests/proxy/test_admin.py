"""The pages of gateway keys and usage, and the commands that make keys."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from io import StringIO
from typing import Any

import pytest
from django.conf import LazySettings
from django.contrib.auth.models import Group, User
from django.core.management import call_command
from django.core.management.base import CommandError
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from audit.changes import changes
from audit.models import Entry
from providers.models import Provider
from proxy import keys
from proxy.models import GatewayKey, UsageRecord

ADD = {"name": "shop", "allowed_models": "openai/*\r\n\r\n tiny ", "allowed_networks": "10.0.0.0/8"}


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def issued(client: Client, **more: str) -> tuple[str, GatewayKey]:
    page = client.post(reverse("admin:proxy_gatewaykey_add"), {**ADD, **more}).content.decode()
    found = keys.FORM.search(page)
    assert found is not None
    return found[0], GatewayKey.objects.get(name=more.get("name", "shop"))


def test_a_new_key_is_shown_once_with_a_line_to_paste(owner: User) -> None:
    client = logged_in(owner)
    whole, key = issued(client)
    parts = keys.parse(whole)
    assert parts is not None
    assert parts.key_id == key.key_id
    assert key.allowed_models == ["openai/*", "tiny"]
    assert key.allowed_networks == ["10.0.0.0/8"]
    assert key.created_by == "owner"
    for page in ("changelist", "change", "history", "delete"):
        address = reverse(f"admin:proxy_gatewaykey_{page}", args=[] if page == "changelist" else [key.pk])
        assert parts.secret not in client.get(address, follow=True).content.decode()
    assert parts.secret not in str(dict(client.session.items()))
    assert parts.secret not in str(client.cookies)


def test_r10_neither_the_log_nor_the_row_holds_a_usable_key(owner: User) -> None:
    whole, key = issued(logged_in(owner))
    secret = str(keys.parse(whole)[1])  # type: ignore[index]  # it was well-formed a line ago
    assert secret not in str(list(Entry.objects.values_list("changes", flat=True)))
    assert secret not in str.__str__(key.hmac)


def test_a_list_of_keys_offers_only_owners_who_have_one(viewer: User, person: Callable[..., User]) -> None:
    with changes(actor=None, via="system"):
        for name in ("ml", "hidden-team"):
            Group.objects.create(name=name)
        for name, owned in (("a", {"owner": viewer}), ("b", {"owner": person("holder")}), ("c", {})):
            key = GatewayKey(name=name, team=None if owned else Group.objects.get(name="ml"), **owned)
            keys.give_secret(key)
            key.save()
    person("hidden-person")
    client, address = logged_in(viewer), reverse("admin:proxy_gatewaykey_changelist")
    page = client.get(address).content.decode()
    assert "holder" in page and "ml" in page
    assert "hidden-person" not in page and "hidden-team" not in page
    for column, value in (
        ("owner", User.objects.get(username="holder").pk),
        ("team", Group.objects.get(name="ml").pk),
    ):
        found = client.get(address, {f"{column}__id__exact": value})
        assert found.context["cl"].result_count == 1


def test_the_line_to_paste_can_be_pasted(owner: User) -> None:
    page = logged_in(owner).post(reverse("admin:proxy_gatewaykey_add"), ADD).content.decode()
    line = re.search(r'<pre id="ps-curl">(.*?)</pre>', page, re.DOTALL)
    assert line is not None
    body = re.search(r"-d '(.*)'", line[1].replace("&quot;", '"'))
    assert body is not None
    assert json.loads(body[1])["stream"] is True


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_networks": "not a network"},
        {"allowed_models": "tiny\r\nb\0ig"},
        {"requests_per_minute": "0"},
        {"name": ""},
    ],
)
def test_a_wrong_limit_is_a_form_error_and_no_key_is_made(owner: User, wrong: dict[str, str]) -> None:
    answer = logged_in(owner).post(reverse("admin:proxy_gatewaykey_add"), {**ADD, **wrong})
    assert next(iter(wrong)) in answer.context["adminform"].form.errors
    assert not GatewayKey.objects.exists()


def test_rotating_asks_first_and_shows_the_new_key_once(operator: User) -> None:
    client = logged_in(operator)
    old, key = issued(client)
    address = reverse("admin:proxy_gatewaykey_rotate", args=[key.pk])
    assert "24 hours" in client.get(address).content.decode()
    page = client.post(address).content.decode()
    found = keys.FORM.search(page)
    assert found is not None
    assert found[0] != old
    key.refresh_from_db()
    assert key.previous_until is not None


def test_a_revoked_key_is_visibly_so_and_stays_so(operator: User, owner: User) -> None:
    client = logged_in(operator)
    _, key = issued(client)
    address = reverse("admin:proxy_gatewaykey_revoke", args=[key.pk])
    assert "cannot be undone" in client.get(address).content.decode()
    assert client.post(address).status_code == 302
    assert "revoked 0 s ago" in client.get(reverse("admin:proxy_gatewaykey_changelist")).content.decode()
    change = reverse("admin:proxy_gatewaykey_change", args=[key.pk])
    logged_in(owner).post(change, {**ADD, "enabled": "on"})
    key.refresh_from_db()
    assert (key.enabled, key.usable) == (False, False)
    for again in ("rotate", "revoke"):
        assert client.post(reverse(f"admin:proxy_gatewaykey_{again}", args=[key.pk])).status_code == 404


def test_the_form_of_a_new_key_is_filled_with_fifty_requests_at_once(
    owner: User, settings: LazySettings
) -> None:
    client = logged_in(owner)

    def filled_with() -> Any:
        form = client.get(reverse("admin:proxy_gatewaykey_add")).context["adminform"].form
        return form["max_concurrency"].value()

    assert filled_with() == 50
    assert issued(client)[1].max_concurrency == 50
    assert issued(client, name="free", max_concurrency="")[1].max_concurrency is None
    assert issued(client, name="wide", max_concurrency="500")[1].max_concurrency == 500
    settings.DEFAULT_MAX_CONCURRENCY = 7
    assert filled_with() == 7
    settings.DEFAULT_MAX_CONCURRENCY = 0
    assert filled_with() is None


def test_a_key_that_is_changed_is_not_given_a_limit_that_it_did_not_have(owner: User) -> None:
    client = logged_in(owner)
    _, key = issued(client, max_concurrency="")
    change = reverse("admin:proxy_gatewaykey_change", args=[key.pk])
    assert client.get(change).context["adminform"].form["max_concurrency"].value() is None
    client.post(change, {**ADD, "name": "shop window", "enabled": "on"})
    assert GatewayKey.objects.filter(name="shop window", max_concurrency=None).exists()


def test_whether_streams_are_resumed_is_chosen_in_the_form(owner: User) -> None:
    client = logged_in(owner)
    page = client.get(reverse("admin:proxy_gatewaykey_add")).content.decode()
    assert "x-penstock-resume" in page
    _, unsaid = issued(client, resume_streams="unknown")
    _, never = issued(client, name="never", resume_streams="false")
    assert (unsaid.resume_streams, never.resume_streams) == (None, False)
    change = reverse("admin:proxy_gatewaykey_change", args=[never.pk])
    client.post(change, {**ADD, "name": "never", "enabled": "on", "resume_streams": "true"})
    never.refresh_from_db()
    assert never.resume_streams is True


def test_an_operator_does_not_change_the_limits_of_a_key(operator: User) -> None:
    client = logged_in(operator)
    _, key = issued(client)
    client.post(
        reverse("admin:proxy_gatewaykey_change", args=[key.pk]),
        {**ADD, "name": "mine", "enabled": "", "resume_streams": "false"},
    )
    key.refresh_from_db()
    assert (key.name, key.enabled, key.resume_streams) == ("shop", True, None)


def test_usage_is_only_looked_at(owner: User) -> None:
    record = UsageRecord.objects.create(
        id=uuid.uuid4(),
        created_at=timezone.now(),
        provider="Box",
        model="tiny",
        status="error",
        error_code="tls_error",
    )
    client = logged_in(owner)
    page = client.get(reverse("admin:proxy_usagerecord_changelist")).content.decode()
    assert "error: tls_error" in page
    assert "unknown" in page
    change = reverse("admin:proxy_usagerecord_change", args=[record.pk])
    assert client.get(change).status_code == 200
    assert client.post(change, {"status": "success"}).status_code == 403
    assert (
        client.post(reverse("admin:proxy_usagerecord_delete", args=[record.pk]), {"post": "yes"}).status_code
        == 403
    )


# -- first_run, issue_key ------------------------------------------------------------------------------------------------


def first_run() -> dict[str, Any]:
    out = StringIO()
    call_command("first_run", "--json", stdout=out)
    lines = out.getvalue().strip().splitlines()
    assert len(lines) == 1
    answer: dict[str, Any] = json.loads(lines[0])
    return answer


@pytest.fixture
def fresh(settings: LazySettings) -> LazySettings:
    """No wishes in the environment."""
    for name in ("USERNAME", "PASSWORD", "EMAIL"):
        setattr(settings, f"DJANGO_SUPERUSER_{name}", "")
    settings.PENSTOCK_GATEWAY_KEY = settings.OPENROUTER_API_KEY = ""
    settings.SETTINGS_PROBLEMS = ()
    return settings


def test_the_first_run_makes_what_is_missing_and_the_second_nothing(fresh: LazySettings, db: None) -> None:
    answer = first_run()
    assert answer["created"] == ["administrator", "gateway key", "echo provider"]
    admin = User.objects.get(username="admin")
    assert admin.is_superuser
    assert admin.check_password(answer["password"])
    assert keys.parse(answer["gateway_key"]) is not None
    assert GatewayKey.objects.get().max_concurrency is None
    assert not Provider.objects.get(slug="echo").active_targets.exists()
    assert first_run() == {"username": "admin", "password": None, "gateway_key": None, "created": []}


def test_r60_two_installations_share_no_secret(fresh: LazySettings, db: None) -> None:
    first = first_run()
    with changes(actor=None, via="system"):
        User.objects.get(username="admin").delete()
        GatewayKey.objects.get().delete()
    second = first_run()
    assert first["password"] != second["password"]
    assert first["gateway_key"] != second["gateway_key"]


def test_a_deleted_echo_provider_stays_deleted(fresh: LazySettings, db: None) -> None:
    first_run()
    with changes(actor=None, via="system"):
        Provider.objects.get(slug="echo").delete()
    assert first_run()["created"] == []
    assert not Provider.objects.filter(slug="echo").exists()


def test_the_wishes_of_the_environment_are_honoured_once(fresh: LazySettings, db: None) -> None:
    whole = keys.compose("0123456789", keys.random_text(32))
    fresh.DJANGO_SUPERUSER_USERNAME, fresh.DJANGO_SUPERUSER_PASSWORD = "ada", "a rather long passphrase"
    fresh.PENSTOCK_GATEWAY_KEY, fresh.OPENROUTER_API_KEY = whole, "sk-or-canary-1234"
    answer = first_run()
    assert (answer["username"], answer["password"], answer["gateway_key"]) == ("ada", None, None)
    assert answer["created"] == ["administrator", "gateway key", "echo provider", "OpenRouter key"]
    assert GatewayKey.objects.get().key_id == "0123456789"
    openrouter = Provider.objects.get(slug="openrouter")
    assert openrouter.enabled
    with changes(actor=None, via="system"):
        openrouter.keys.get().delete()
    fresh.DJANGO_SUPERUSER_USERNAME = "bob"
    assert first_run()["created"] == []
    assert not User.objects.filter(username="bob").exists()


@pytest.mark.parametrize("name", ["PENSTOCK_GATEWAY_KEY", "OPENROUTER_API_KEY"])
def test_a_malformed_key_stops_the_start_with_one_line_and_makes_nothing(
    fresh: LazySettings, db: None, name: str
) -> None:
    setattr(fresh, name, "not a key")
    with pytest.raises(CommandError, match=name) as refused:
        first_run()
    assert "\n" not in str(refused.value)
    assert "not a key" not in str(refused.value)
    assert not User.objects.exists()
    assert not GatewayKey.objects.exists()


def test_a_key_is_issued_from_the_command_line(db: None, stranger: User) -> None:
    out = StringIO()
    call_command("issue_key", "cron", "--owner", "stranger", stdout=out)
    parts = keys.parse(out.getvalue().strip())
    assert parts is not None
    key = GatewayKey.objects.get()
    assert (key.name, key.owner, key.key_id) == ("cron", stranger, parts.key_id)
    assert Entry.objects.get(action="add_gateway_key").via == "command"
    assert GatewayKey.objects.filter(name="cron", max_concurrency=None).exists()
    call_command("issue_key", "batch", "--max-concurrency", "3", stdout=out)
    assert GatewayKey.objects.get(name="batch").max_concurrency == 3
    for wrong in ("0", "many"):
        with pytest.raises(CommandError):
            call_command("issue_key", "wrong", "--max-concurrency", wrong)
    with pytest.raises(CommandError):
        call_command("issue_key", "cron")
    with pytest.raises(CommandError, match="no user or team nobody"):
        call_command("issue_key", "other", "--owner", "nobody")
