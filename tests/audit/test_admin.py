"""The base of the admin: who may do what, what is recorded, what is refused, what never shows."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from django.contrib import admin
from django.contrib.auth.models import Group, User
from django.db import connection
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry, Head
from providers import keys as provider_keys
from providers.models import ApiKey, HealthCheck, Provider, ProviderHealth, Server, UpstreamModel
from proxy import keys
from proxy.models import GatewayKey

CANARY = "sk-canary-4f9a8e7d6c5b-a1b2"
SERVER = {
    "name": "Box",
    "kind": "ollama",
    "base_url": "http://localhost:11434",
    "enabled": "on",
    "use_for_chat": "on",
    "priority": "100",
    "custom_headers": "",
    "metadata": "{}",
}
KEY = {"api_key": "sk-forged-123456", "enabled": "on", "weight": "1", "metadata": "{}"}
PASSWORD = "a rather long passphrase"


def as_user(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def new_password(word: str) -> dict[str, str]:
    return {"usable_password": "true", "password1": word, "password2": word}


def hidden_fields(html: str) -> dict[str, str]:
    return dict(re.findall(r'<input type="hidden" name="(row_version)" value="([^"]*)"', html))


@pytest.fixture
def server(db: None) -> Server:
    """A server of our own with a stored key, a model, and a history."""
    with changes(actor=None, via="system"):
        row = Server.objects.create(name="Box", kind="ollama", base_url="http://localhost:11434")
        provider_keys.add(ApiKey(provider=Provider.objects.get(pk=row.pk), name="default"), CANARY)
        UpstreamModel.objects.create(provider=row, name="tiny")
    ProviderHealth.objects.create(provider=row)
    HealthCheck.objects.create(provider=row, status="online")
    return row


@pytest.fixture
def gateway_key(db: None) -> GatewayKey:
    key = GatewayKey(name="shop")
    keys.give_secret(key)
    with changes(actor=None, via="system"):
        key.save()
    return key


def pages_of(row: Any) -> list[str]:
    name = f"admin:{row._meta.app_label}_{row._meta.model_name}"
    return [
        reverse(f"{name}_changelist"),
        reverse(f"{name}_change", args=[row.pk]),
        reverse(f"{name}_delete", args=[row.pk]),
        reverse(f"{name}_change", args=[row.pk]) + "?_popup=1",
    ]


# -- pages -------------------------------------------------------------------------------------------------------------


def test_every_list_answers_and_no_page_that_is_only_read_changes_anything(
    owner: User, server: Server, gateway_key: GatewayKey
) -> None:
    client, before = as_user(owner), Head.objects.get().seq
    for model, model_admin in admin.site._registry.items():
        name = f"admin:{model._meta.app_label}_{model._meta.model_name}"
        assert client.get(reverse(f"{name}_changelist")).status_code == 200, name
        if not hasattr(model_admin, "object_views"):
            continue
        for view, _ in model_admin.object_views:
            row = model._default_manager.first()
            assert client.get(reverse(f"{name}_{view}", args=[getattr(row, "pk", 0)])).status_code in {
                200,
                302,
                404,
            }, view
    for row in (server, gateway_key, owner, Entry.objects.first()):
        for page in pages_of(row):
            assert client.get(page).status_code in {200, 403}, page
    assert client.get("/admin/").status_code == 200
    assert Head.objects.get().seq == before


def test_a_stranger_and_a_member_do_not_get_in(
    stranger: User, person: Callable[..., User], server: Server
) -> None:
    for user in (stranger, person("mia", "member")):
        for page in ("/admin/", *pages_of(server)):
            answer = as_user(user).get(page)
            assert answer.status_code == 302
            assert "/admin/login/" in answer["Location"]


def test_only_the_admin_may_evaluate_scripts(client: Client) -> None:
    assert "'unsafe-eval'" in client.get("/admin/login/")["Content-Security-Policy"]
    elsewhere = client.get("/")["Content-Security-Policy"]
    assert "'unsafe-eval'" not in elsewhere
    assert "script-src 'self'" in elsewhere
    assert "'unsafe-inline'" not in elsewhere.split("script-src")[1].split(";")[0]


# -- R44: who may only look ---------------------------------------------------------------------------------------------


def forged_posts(server: Server, key: GatewayKey) -> list[tuple[str, dict[str, Any]]]:
    target = {"targets-TOTAL_FORMS": "1", "targets-INITIAL_FORMS": "0", "targets-0-provider": str(server.pk)}
    change = reverse("admin:providers_server_change", args=[server.pk])
    return [
        (reverse("admin:providers_server_add"), {**SERVER, "name": "Forged"}),
        (change, {**SERVER, "name": "Forged"}),
        (reverse("admin:providers_server_delete", args=[server.pk]), {"post": "yes"}),
        (reverse("admin:providers_server_override", args=[server.pk]), {"decision": "out"}),
        (reverse("admin:providers_server_test", args=[server.pk]), {}),
        (reverse("admin:providers_server_discover", args=[server.pk]), {}),
        (reverse("admin:providers_apikey_add"), {**KEY, "provider": server.pk, "name": "f"}),
        (reverse("admin:providers_activeprovider_change", args=["chat"]), target),
        (reverse("admin:providers_activeprovider_clear", args=["chat"]), {}),
        (reverse("admin:proxy_gatewaykey_add"), {"name": "forged"}),
        (reverse("admin:proxy_gatewaykey_rotate", args=[key.pk]), {}),
        (reverse("admin:proxy_gatewaykey_revoke", args=[key.pk]), {}),
        (reverse("admin:auth_user_add"), {"username": "forged", **new_password(PASSWORD)}),
    ]


def test_r44_who_may_only_look_cannot_change_anything_by_forged_forms(
    viewer: User, server: Server, gateway_key: GatewayKey
) -> None:
    client, before = as_user(viewer), Head.objects.get().seq
    for address, form in forged_posts(server, gateway_key):
        assert client.post(address, form).status_code == 403, address
    assert Head.objects.get().seq == before
    assert not GatewayKey.objects.exclude(pk=gateway_key.pk).exists()


def test_r44_who_may_only_look_cannot_run_actions_of_lists(viewer: User, server: Server) -> None:
    client, before = as_user(viewer), Head.objects.get().seq
    for action in ("delete_selected", "test_selected"):
        client.post(
            reverse("admin:providers_server_changelist"),
            {"action": action, "_selected_action": [str(server.pk)], "post": "yes", "index": "0"},
        )
    assert Server.objects.filter(pk=server.pk).exists()
    assert Head.objects.get().seq == before
    assert ProviderHealth.objects.get(pk=server.pk).last_checked_at is None


@pytest.mark.parametrize(
    ("page", "lookup"),
    [
        ("providers_apikey", "secret__startswith"),
        ("providers_apikey", "secret"),
        ("providers_apikey", "fingerprint__startswith"),
        ("providers_apikey", "provider__keys__fingerprint__startswith"),
        ("providers_provider", "custom_headers__icontains"),
        ("providers_provider", "ca_pem__startswith"),
        ("proxy_gatewaykey", "hmac__startswith"),
        ("proxy_gatewaykey", "hmac__regex"),
        ("proxy_gatewaykey", "owner__password__startswith"),
        ("proxy_gatewaykey", "previous_hmac__gte"),
    ],
)
def test_r44_a_hidden_column_cannot_be_read_letter_by_letter(
    viewer: User, server: Server, gateway_key: GatewayKey, page: str, lookup: str
) -> None:
    client = as_user(viewer)
    answers = [
        client.get(reverse(f"admin:{page}_changelist"), {lookup: value}) for value in ("v", "zz", ".*")
    ]
    assert {answer.status_code for answer in answers} == {400}


def test_what_a_list_offers_as_a_filter_still_works(owner: User, server: Server) -> None:
    client = as_user(owner)
    keys_page = reverse("admin:providers_apikey_changelist")
    assert client.get(keys_page, {"provider__id__exact": server.pk}).context["cl"].result_count == 1
    assert client.get(keys_page, {"enabled__exact": "0"}).context["cl"].result_count == 0
    servers = reverse("admin:providers_server_changelist")
    assert client.get(servers, {"health": "unknown"}).context["cl"].result_count == 1


@pytest.mark.parametrize(
    ("page", "query"),
    [
        ("audit_entry", "timestamp__year=9999"),
        ("audit_entry", "timestamp__gte=0001-01-01T00:00:00%2B14:00"),
        ("audit_entry", "action__exact=%00"),
        ("audit_entry", f"user_id__exact={'9' * 30}"),
        ("providers_healthcheck", "at__year=9999"),
        ("providers_apikey", f"provider__id__exact={'9' * 400}"),
        ("proxy_usagerecord", "created_at__year=0"),
    ],
)
def test_a_filter_that_nobody_can_answer_leads_to_the_whole_list(owner: User, page: str, query: str) -> None:
    address = reverse(f"admin:{page}_changelist")
    answer = as_user(owner).get(f"{address}?{query}")
    # Some of them one database can answer, with nothing.
    assert answer.status_code == 200 or (answer.status_code, answer["Location"]) == (302, f"{address}?e=1")


@pytest.mark.parametrize("number", ["9" * 5000, "9" * 30, "²", "x"], ids=["long", "big", "square", "word"])
@pytest.mark.parametrize("page", ["providers_provider", "providers_server", "providers_activeprovider"])
def test_a_number_that_no_row_has_is_not_found(owner: User, page: str, number: str) -> None:
    answer = as_user(owner).get(reverse(f"admin:{page}_change", args=[number]), follow=True)
    assert answer.status_code in {200, 404}
    assert answer.status_code == 404 or answer.redirect_chain == [("/admin/", 302)]


# -- R08: what never shows -----------------------------------------------------------------------------------------------


def test_r08_no_page_ever_shows_a_stored_key(owner: User, server: Server, gateway_key: GatewayKey) -> None:
    client = as_user(owner)
    key = ApiKey.objects.get()
    sealed = str.__str__(key.secret)
    entries = [reverse("admin:audit_entry_change", args=[entry.pk]) for entry in Entry.objects.all()]
    addresses = [page for row in (server, key, gateway_key) for page in pages_of(row)] + entries
    addresses += [
        reverse("admin:providers_server_history", args=[server.pk]),
        reverse("admin:audit_entry_changelist"),
    ]
    for address in addresses:
        html = client.get(address, follow=True).content.decode()
        for secret in (CANARY, sealed, str.__str__(gateway_key.hmac)):
            assert secret not in html, address
    assert "…a1b2" in client.get(reverse("admin:providers_server_change", args=[server.pk])).content.decode()


# -- recording -----------------------------------------------------------------------------------------------------------


def test_each_change_is_one_entry_with_its_author_and_address(owner: User) -> None:
    answer = as_user(owner).post(
        reverse("admin:providers_server_add"), SERVER, headers={"x-request-id": "req-7"}
    )
    assert answer.status_code == 302
    entry = Entry.objects.get(action="add_server")
    assert (entry.username, entry.via, entry.ip, entry.request_id) == ("owner", "admin", "127.0.0.1", "req-7")
    assert entry.changes["base_url"] == [None, "http://localhost:11434"]


def test_deleting_several_at_once_records_each_of_them(owner: User, server: Server) -> None:
    with changes(actor=None, via="system"):
        other = Server.objects.create(name="Other", kind="vllm", base_url="http://localhost:8000")
    form = {"action": "delete_selected", "_selected_action": [server.pk, other.pk], "index": "0"}
    client, address = as_user(owner), reverse("admin:providers_server_changelist")
    assert "Health check: " not in client.post(address, form).content.decode()
    client.post(address, {**form, "post": "yes"})
    assert not Server.objects.exists()
    deleted = set(Entry.objects.filter(action="delete_server").values_list("entity_name", flat=True))
    assert deleted == {"Box", "Other"}
    assert Entry.objects.filter(action="delete_key", username="owner").count() == 1


def test_the_history_of_a_thing_is_what_the_audit_log_says_about_it(owner: User, server: Server) -> None:
    page = as_user(owner).get(reverse("admin:providers_server_history", args=[server.pk]), follow=True)
    assert [entry.action for entry in page.context["cl"].result_list] == ["add_server"]


def test_f40_the_second_of_two_who_save_is_told_who_was_faster(
    owner: User, operator: User, server: Server
) -> None:
    address = reverse("admin:providers_server_change", args=[server.pk])
    first, second = as_user(operator), as_user(owner)
    opened = hidden_fields(second.get(address).content.decode())
    assert (
        first.post(
            address, {**SERVER, **hidden_fields(first.get(address).content.decode()), "priority": "5"}
        ).status_code
        == 302
    )
    answer = second.post(address, {**SERVER, **opened, "priority": "9"})
    assert answer.status_code == 200
    assert "operator changed this at" in answer.content.decode()
    assert Server.objects.get().priority == 5


def test_f40_health_never_causes_a_conflict(owner: User, server: Server) -> None:
    address, client = reverse("admin:providers_server_change", args=[server.pk]), as_user(owner)
    opened = hidden_fields(client.get(address).content.decode())
    ProviderHealth.objects.filter(pk=server.pk).update(consecutive_failures=3)
    assert client.post(address, {**SERVER, **opened, "priority": "9"}).status_code == 302


def test_f40_rows_without_a_version_are_guarded_too(owner: User, server: Server) -> None:
    model = UpstreamModel.objects.get()
    address, client = reverse("admin:providers_upstreammodel_change", args=[model.pk]), as_user(owner)
    opened = hidden_fields(client.get(address).content.decode())
    assert opened
    with changes(actor=None, via="system"):
        model.context_window = 4096
        model.save()
    answer = client.post(address, {"enabled": "on", "context_window": "1", **opened})
    assert "after you opened the page" in answer.content.decode()


@pytest.fixture
def broken_log(db: None) -> Iterator[None]:
    """An audit table that takes no more entries."""
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute(
                "CREATE TRIGGER audit_full BEFORE INSERT ON audit_entry BEGIN SELECT RAISE(ABORT, 'full'); END"
            )
        else:
            cursor.execute("ALTER TABLE audit_entry ADD CONSTRAINT audit_full CHECK (seq < 0) NOT VALID")
    yield
    with connection.cursor() as cursor:
        if connection.vendor == "sqlite":
            cursor.execute("DROP TRIGGER audit_full")
        else:
            cursor.execute("ALTER TABLE audit_entry DROP CONSTRAINT audit_full")


def test_r50_what_cannot_be_recorded_is_not_done_and_says_so(
    owner: User, server: Server, gateway_key: GatewayKey, broken_log: None
) -> None:
    client = as_user(owner)
    for address, form in forged_posts(server, gateway_key):
        if address.endswith(("/test/", "/discover/", "/chat/clear/")):
            continue
        answer = client.post(address, form)
        assert answer.status_code == 503, address
        assert "Nothing was changed" in answer.content.decode()
        assert "pen_live_" not in answer.content.decode()
    assert list(Server.objects.values_list("name", flat=True)) == ["Box"]
    assert GatewayKey.objects.get().revoked_at is None
    told = client.get(reverse("admin:providers_server_changelist")).content.decode()
    assert "successfully" not in told


# -- people --------------------------------------------------------------------------------------------------------------


def test_changing_ones_own_password_is_recorded_without_the_password(owner: User) -> None:
    client = as_user(owner)
    new = "a much better passphrase"
    form = {"old_password": "correct horse battery", "new_password1": new, "new_password2": new}
    assert client.post(reverse("admin:password_change"), form).status_code == 302
    assert User.objects.get(username="owner").check_password(new)
    entry = Entry.objects.filter(entity_type="user").first()
    assert entry is not None
    assert (entry.action, entry.username, entry.changes) == (
        "update_user",
        "owner",
        {"password": ["••••", "••••"]},
    )


def test_a_person_is_added_given_a_role_and_a_new_password(owner: User) -> None:
    client = as_user(owner)
    add = {"username": "olga", **new_password(PASSWORD)}
    assert client.post(reverse("admin:auth_user_add"), add).status_code == 302
    olga = User.objects.get(username="olga")
    role = {"username": "olga", "is_active": "on", "groups": [group_id("operator")]}
    assert client.post(reverse("admin:auth_user_change", args=[olga.pk]), role).status_code == 302
    olga.refresh_from_db()
    assert olga.is_staff
    assert as_user(olga).get("/admin/").status_code == 200
    again = new_password(PASSWORD[::-1])
    address = reverse("admin:auth_user_password_change", args=[olga.pk])
    client.post(reverse("account_reauthenticate"), {"password": "correct horse battery"})
    assert client.post(address, again).status_code == 302
    actions = list(Entry.objects.filter(entity_name="olga", via="admin").values_list("action", flat=True))
    assert actions == ["update_user", "update_user", "add_user"]


def group_id(name: str) -> int:
    return int(Group.objects.get(name=name).pk)


def test_only_a_superuser_makes_or_changes_superusers(owner: User, person: Callable[..., User]) -> None:
    client = as_user(person("ada", "administrator"))
    address = reverse("admin:auth_user_change", args=[owner.pk])
    assert client.post(address, {"username": "owner"}).status_code == 403
    stranger = person("stan")
    form = {"username": "stan", "is_active": "on", "is_superuser": "on", "groups": []}
    client.post(reverse("admin:auth_user_change", args=[stranger.pk]), form)
    stranger.refresh_from_db()
    assert not stranger.is_superuser
