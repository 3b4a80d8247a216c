"""The pages of providers: keys go in and never come out, tests dial, active providers are one form."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from audit.changes import changes
from audit.models import Entry
from providers import keys
from providers.active import Target, set_active
from providers.models import ActiveProvider, ApiKey, HealthCheck, Provider, ProviderHealth, Server
from providers.models.checks import check_metadata
from tests.support.ports import closed_port

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
VENDOR = {
    **SERVER,
    "name": "OpenAI",
    "kind": "openai",
    "base_url": "https://api.openai.com/v1",
    "slug": "openai",
    "enabled": "",
}


@pytest.fixture
def admin(owner: User) -> Client:
    client = Client()
    client.force_login(owner)
    return client


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


def stored_key(provider: Provider) -> str:
    return keys.opened(ApiKey.objects.get(provider=provider)).reveal()


def make_server(name: str = "Box", **fields: Any) -> Server:
    fields = {"kind": "ollama", "base_url": "http://localhost:11434", **fields}
    with changes(actor=None, via="system"):
        return Server.objects.create(name=name, **fields)


def make_echo(name: str = "Echo", **fields: Any) -> Provider:
    with changes(actor=None, via="system"):
        return Provider.objects.create(name=name, kind="echo", base_url="https://echo.invalid/v1", **fields)


def change_page(row: Any) -> str:
    return reverse(f"admin:providers_{row._meta.model_name}_change", args=[row.pk])


# -- keys ----------------------------------------------------------------------------------------------------------------


def test_r08_an_empty_input_keeps_the_key_and_a_filled_one_replaces_it(admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    server = Server.objects.get()
    page = admin.get(change_page(server)).content.decode()
    assert 'type="password"' in page
    assert 'placeholder="…a1b2"' in page
    assert CANARY not in page
    assert admin.post(change_page(server), {**SERVER, "api_key": "", "priority": "7"}).status_code == 302
    assert stored_key(server) == CANARY
    assert admin.post(change_page(server), {**SERVER, "api_key": "sk-another-key-9999"}).status_code == 302
    assert stored_key(server) == "sk-another-key-9999"
    assert CANARY not in str(list(Entry.objects.values_list("changes", flat=True)))


@pytest.mark.parametrize("masked", ["…a1b2", "****a1b2", "••••••••", "...a1b2"])
def test_r08_the_masked_form_of_a_key_is_never_stored_as_a_key(admin: Client, masked: str) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    server = Server.objects.get()
    answer = admin.post(change_page(server), {**SERVER, "api_key": masked})
    assert "masked form of a key" in answer.content.decode()
    assert stored_key(server) == CANARY


def test_r08_a_form_with_an_error_does_not_show_the_key_that_was_typed(admin: Client) -> None:
    answer = admin.post(reverse("admin:providers_server_add"), {**SERVER, "name": "", "api_key": CANARY})
    assert answer.status_code == 200
    assert CANARY not in answer.content.decode()


def test_r25_a_new_address_needs_the_key_along(admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    server = Server.objects.get()
    moved = {**SERVER, "base_url": "http://localhost:9999"}
    answer = admin.post(change_page(server), moved)
    assert answer.context["adminform"].form.errors.keys() == {"api_key"}
    assert Server.objects.get().base_url == "http://localhost:11434"
    assert admin.post(change_page(server), {**moved, "api_key": CANARY}).status_code == 302
    assert Server.objects.get().base_url == "http://localhost:9999"
    assert stored_key(Server.objects.get()) == CANARY


def test_r25_another_path_on_the_same_host_needs_no_key(admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    answer = admin.post(
        change_page(Server.objects.get()), {**SERVER, "base_url": "http://localhost:11434/v1"}
    )
    assert answer.status_code == 302
    assert stored_key(Server.objects.get()) == CANARY


def test_a_vendor_is_enabled_by_its_first_key(admin: Client) -> None:
    vendor = Provider.objects.get(slug="openai")
    assert not vendor.enabled
    answer = admin.post(change_page(vendor), {**VENDOR, "api_key": CANARY}, follow=True)
    assert "so it was enabled" in answer.content.decode()
    vendor.refresh_from_db()
    assert vendor.enabled


def test_a_vendors_own_address_is_filled_in(admin: Client) -> None:
    form = {**VENDOR, "name": "Second account", "slug": "", "base_url": ""}
    assert admin.post(reverse("admin:providers_provider_add"), form).status_code == 302
    assert Provider.objects.get(name="Second account").base_url == "https://api.openai.com/v1"


def test_a_servers_address_is_asked_for(admin: Client) -> None:
    answer = admin.post(reverse("admin:providers_server_add"), {**SERVER, "base_url": ""})
    assert "base_url" in answer.context["adminform"].form.errors


def test_the_first_of_several_keys_is_the_default_until_another_is(admin: Client) -> None:
    vendor = Provider.objects.get(slug="openai")
    form = {"provider": vendor.pk, "enabled": "on", "weight": "1", "metadata": "{}"}
    add = reverse("admin:providers_apikey_add")
    for name, value in (("one", "sk-number-one-1111"), ("two", "sk-number-two-2222")):
        assert admin.post(add, {**form, "name": name, "api_key": value}).status_code == 302
    assert admin.post(add, {**form, "name": "three", "api_key": ""}).status_code == 200
    one, two = ApiKey.objects.get(name="one"), ApiKey.objects.get(name="two")
    assert (one.is_default, two.is_default) == (True, False)
    assert admin.post(change_page(two), {**form, "name": "two", "is_default": "on"}).status_code == 302
    assert list(ApiKey.objects.filter(is_default=True)) == [two]
    assert keys.opened(ApiKey.objects.get(pk=two.pk)).reveal() == "sk-number-two-2222"


def test_an_operator_replaces_a_secret_and_nothing_else(operator: User, admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    key = ApiKey.objects.get()
    client = logged_in(operator)
    form = {"api_key": "sk-operator-7777", "name": "renamed", "weight": "9", "enabled": ""}
    assert client.post(change_page(key), form).status_code == 302
    key = ApiKey.objects.get()
    assert (key.name, key.weight, key.enabled, key.last4) == ("default", 1, True, "7777")


def test_only_an_administrator_enables_a_key_with_a_new_secret(operator: User, admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "api_key": CANARY})
    server, key = Server.objects.get(), ApiKey.objects.get()
    with changes(actor=None, via="system"):
        key.enabled = False
        key.save()
    for client, enabled in ((logged_in(operator), False), (admin, True)):
        client.post(change_page(server), {**SERVER, "api_key": f"sk-another-{enabled}"})
        assert stored_key(server) == f"sk-another-{enabled}"
        assert ApiKey.objects.get().enabled is enabled


def test_only_an_administrator_says_where_a_key_is_kept(operator: User, admin: Client) -> None:
    form = {**SERVER, "api_key": "env://UPSTREAM_KEY"}
    assert (
        "Only an administrator"
        in logged_in(operator).post(reverse("admin:providers_server_add"), form).content.decode()
    )
    assert admin.post(reverse("admin:providers_server_add"), form).status_code == 302
    assert 'placeholder="env://UPSTREAM_KEY"' in admin.get(change_page(Server.objects.get())).content.decode()


def test_only_an_administrator_allows_private_addresses(operator: User, admin: Client) -> None:
    vendor = Provider.objects.get(slug="openai")
    form = {**VENDOR, "allow_private": "on"}
    logged_in(operator).post(change_page(vendor), form)
    vendor.refresh_from_db()
    assert not vendor.allow_private
    admin.post(change_page(vendor), form)
    vendor.refresh_from_db()
    assert vendor.allow_private


@pytest.mark.parametrize(
    "address", ["http://169.254.169.254/latest", "http://user:pw@localhost:1", "ftp://x", "http://["]
)
def test_r19_an_address_that_may_not_be_dialled_is_a_form_error(admin: Client, address: str) -> None:
    answer = admin.post(reverse("admin:providers_server_add"), {**SERVER, "base_url": address})
    assert "base_url" in answer.context["adminform"].form.errors
    assert not Server.objects.exists()


@pytest.mark.parametrize(
    "headers", ["X-Team blue", "Authorization: Bearer x", "X-A: 1\nx-a: 2", "X-B\x00: 1"]
)
def test_r27_headers_that_may_not_be_sent_are_a_form_error(admin: Client, headers: str) -> None:
    answer = admin.post(reverse("admin:providers_server_add"), {**SERVER, "custom_headers": headers})
    assert "custom_headers" in answer.context["adminform"].form.errors


def test_headers_are_typed_as_lines(admin: Client) -> None:
    admin.post(
        reverse("admin:providers_server_add"), {**SERVER, "custom_headers": "X-Team: blue\r\nX-Cost: a: b"}
    )
    assert Server.objects.get().custom_headers == {"X-Team": "blue", "X-Cost": "a: b"}
    shown = admin.get(change_page(Server.objects.get())).context["adminform"].form["custom_headers"].value()
    # PostgreSQL keeps no order.
    assert set(shown.splitlines()) == {"X-Team: blue", "X-Cost: a: b"}


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (r'{"a": "\ud800"}', "half of a surrogate pair"),
        (r'{"a": "\u0000"}', "NUL"),
        ('{"a": NaN}', "NaN is not a JSON number"),
        ('{"a": 1e999}', "too large"),
        ('{"a": 1, "a": 2}', "twice"),
        ("1" * 5000, "too many digits"),
        ("[" * 100_000, "too deeply"),
        ("[]", "Write an object"),
        ('""', "Write an object"),
        ("{", "not JSON"),
    ],
)
@pytest.mark.parametrize("page", ["server", "provider", "apikey"])
def test_metadata_is_read_as_strictly_as_through_the_api(
    admin: Client, page: str, typed: str, said: str
) -> None:
    answer = admin.post(reverse(f"admin:providers_{page}_add"), {"metadata": typed})
    assert answer.status_code == 200
    assert said in str(answer.context["adminform"].form.errors["metadata"])
    assert answer.context["adminform"].form["metadata"].value() == typed


@pytest.mark.parametrize(
    "value", [float("nan"), [float("inf")], {"b": float("-inf")}, "\0", "\ud800", {"\udfff": 1}]
)
def test_whatever_door_it_came_through_metadata_can_be_stored_and_read_again(value: Any) -> None:
    with pytest.raises(ValidationError):
        check_metadata({"a": value})
    check_metadata({"a": [1, 1.5, None, "😀", {"b": True}]})


@pytest.mark.parametrize("typed", ["", " ", "null", "{}"])
def test_no_metadata_is_an_empty_object(admin: Client, typed: str) -> None:
    server = make_server(metadata={"rack": 4})
    answer = admin.post(change_page(server), {**SERVER, "metadata": typed})
    assert answer.status_code == 302
    assert Server.objects.get().metadata == {}


def test_metadata_is_shown_as_it_can_be_read_again(admin: Client) -> None:
    admin.post(reverse("admin:providers_server_add"), {**SERVER, "metadata": '{"stadt": "Zürich"}'})
    form = admin.get(change_page(Server.objects.get())).context["adminform"].form
    assert form["metadata"].value() == '{"stadt": "Zürich"}'
    assert (
        admin.get(reverse("admin:providers_server_add")).context["adminform"].form["metadata"].value() == "{}"
    )


def test_what_one_form_says_about_its_key_stays_there(admin: Client) -> None:
    optional = "API key (if it wants one)"
    assert optional in admin.get(reverse("admin:providers_server_add")).content.decode()
    for page in ("providers_apikey_add", "providers_provider_add"):
        assert optional not in admin.get(reverse(f"admin:{page}")).content.decode()


# -- deleting ------------------------------------------------------------------------------------------------------------


def test_what_is_in_use_is_not_deleted_and_the_page_says_where(admin: Client) -> None:
    server = make_server()
    with changes(actor=None, via="system"):
        set_active("chat", [Target(Provider.objects.get(pk=server.pk))])
    answer = admin.post(reverse("admin:providers_server_delete", args=[server.pk]), {"post": "yes"})
    assert answer.status_code == 409
    assert "is the active provider for chat" in answer.content.decode()
    assert reverse("admin:providers_activeprovider_change", args=["chat"]) in answer.content.decode()
    assert Server.objects.exists()


def test_an_operator_deletes_a_server_with_its_history(operator: User) -> None:
    server = make_server()
    ProviderHealth.objects.create(provider=server)
    HealthCheck.objects.create(provider=server, status="online")
    address = reverse("admin:providers_server_delete", args=[server.pk])
    assert logged_in(operator).post(address, {"post": "yes"}).status_code == 302
    assert not Server.objects.exists()


# -- testing, health -----------------------------------------------------------------------------------------------------


def test_a_test_shows_what_it_saw_and_saves_the_models_with_one_click(admin: Client) -> None:
    echo = make_echo()
    page = admin.post(reverse("admin:providers_provider_test", args=[echo.pk])).content.decode()
    for words in ("It answers", "online", "200", " ms", "Save these models"):
        assert words in page
    answer = admin.post(reverse("admin:providers_provider_discover", args=[echo.pk]), follow=True)
    assert "lists 1 models: 1 new" in answer.content.decode()
    assert [model.name for model in echo.upstream_models.all()] == ["echo"]
    assert "healthy, 0 s ago" in answer.content.decode()


def test_a_test_that_fails_says_why(admin: Client) -> None:
    with closed_port() as port:
        server = make_server(base_url=f"http://127.0.0.1:{port}")
        page = admin.post(reverse("admin:providers_server_test", args=[server.pk])).content.decode()
    assert "It does not answer as it should" in page
    assert "unreachable" in page
    assert "Save these models" not in page


def test_several_are_tested_from_the_list(admin: Client) -> None:
    def chosen(page: str, row: Provider) -> str:
        form = {"action": "test_selected", "index": "0", "_selected_action": [row.pk]}
        return admin.post(reverse(f"admin:{page}_changelist"), form, follow=True).content.decode()

    assert "Echo: online · HTTP 200" in chosen("providers_provider", make_echo())
    with closed_port() as port:
        assert "Box: unreachable" in chosen(
            "providers_server", make_server(base_url=f"http://127.0.0.1:{port}")
        )


def test_a_provider_is_taken_out_and_put_back_by_hand(admin: Client) -> None:
    server = make_server()
    address = reverse("admin:providers_server_override", args=[server.pk])
    taken = admin.post(address, {"decision": "out"}, follow=True).content.decode()
    assert "taken out by hand" in taken
    assert not ProviderHealth.objects.get().is_healthy
    assert "Box is taken out by hand" in admin.get("/admin/").content.decode()
    admin.post(address, {"decision": "probes"})
    assert ProviderHealth.objects.get().override is None
    assert (
        list(Entry.objects.filter(username="owner").values_list("action", flat=True))
        == ["override_server"] * 2
    )


def test_the_list_says_how_each_feels_in_words(admin: Client) -> None:
    healthy, down = make_server("Up"), make_server("Down")
    now = timezone.now()
    ProviderHealth.objects.create(provider=healthy, health_status="healthy", last_checked_at=now)
    ProviderHealth.objects.create(
        provider=down,
        health_status="down",
        is_healthy=False,
        last_checked_at=now,
        changed_at=now,
        detail="refused",
    )
    page = admin.get(reverse("admin:providers_server_changelist")).content.decode()
    assert "healthy, " in page
    assert "down, " in page
    start = admin.get("/admin/").content.decode()
    assert "Down is down for 0 s" in start
    assert "refused" in start


# -- active provider -----------------------------------------------------------------------------------------------------


def targets(*rows: tuple[Any, Any, str], **more: str) -> dict[str, Any]:
    form: dict[str, Any] = {"targets-TOTAL_FORMS": str(len(rows)), "targets-INITIAL_FORMS": "0", **more}
    for number, (provider, key, model) in enumerate(rows):
        form[f"targets-{number}-provider"] = provider.pk if provider else ""
        form[f"targets-{number}-api_key"] = key.pk if key else ""
        form[f"targets-{number}-model"] = model
    return form


def test_the_three_purposes_are_listed_before_anything_is_chosen(admin: Client) -> None:
    page = admin.get(reverse("admin:providers_activeprovider_changelist")).content.decode()
    for purpose in ("Chat", "Embeddings", "Reranking"):
        assert purpose in page
    assert page.count("No provider chosen yet.") == 3
    empty = admin.get(reverse("admin:providers_activeprovider_change", args=["chat"])).content.decode()
    assert "Add a server" in empty


def test_an_active_provider_and_its_fallbacks_are_one_form_and_one_entry(admin: Client) -> None:
    first, second = make_server("First"), make_server("Second", base_url="http://localhost:1234")
    address = reverse("admin:providers_activeprovider_change", args=["chat"])
    assert (
        admin.post(address, targets((first, None, "llama"), (None, None, ""), (second, None, ""))).status_code
        == 302
    )
    stored = ActiveProvider.objects.get(purpose="chat").targets.all()
    assert [(target.position, target.provider.name, target.model) for target in stored] == [
        (0, "First", "llama"),
        (1, "Second", ""),
    ]
    assert Entry.objects.filter(action="set_active").count() == 1
    # The other way round, although positions are unique.
    assert admin.post(address, targets((second, None, ""), (first, None, "llama"))).status_code == 302
    stored = ActiveProvider.objects.get(purpose="chat").targets.all()
    assert [target.provider.name for target in stored] == ["Second", "First"]


def test_an_active_provider_that_cannot_be_is_a_form_error(admin: Client) -> None:
    chat, other = make_server("Chat"), make_server("Other", use_for_chat=False)
    with changes(actor=None, via="system"):
        key = ApiKey(provider=Provider.objects.get(pk=other.pk), name="default")
        keys.add(key, CANARY)
    address = reverse("admin:providers_activeprovider_change", args=["chat"])
    for form in (
        targets((other, None, "")),
        targets((chat, key, "")),
        targets((None, None, "lonely")),
        targets((chat, None, ""), (chat, None, "")),
        targets(),
    ):
        assert admin.post(address, form).status_code == 200
    assert not ActiveProvider.objects.exists()


def test_f40_the_second_of_two_who_choose_is_refused(admin: Client, operator: User) -> None:
    first, second = make_server("First"), make_server("Second")
    address = reverse("admin:providers_activeprovider_change", args=["chat"])
    assert logged_in(operator).post(address, targets((first, None, ""), row_version="")).status_code == 302
    answer = admin.post(address, targets((second, None, ""), row_version=""))
    assert "operator changed this" in answer.content.decode()
    assert ActiveProvider.objects.get().targets.get().provider.name == "First"


def test_a_purpose_is_cleared(admin: Client) -> None:
    server = make_server()
    admin.post(reverse("admin:providers_activeprovider_change", args=["chat"]), targets((server, None, "")))
    assert admin.post(reverse("admin:providers_activeprovider_clear", args=["chat"])).status_code == 302
    assert not ActiveProvider.objects.exists()


# -- the start page ------------------------------------------------------------------------------------------------------


def done_steps(client: Client) -> list[bool]:
    return [step.done for step in client.get("/admin/").context["steps"]]


def test_getting_started_follows_what_is_there(admin: Client) -> None:
    assert done_steps(admin) == [False] * 5
    server = make_server()
    assert done_steps(admin) == [True, False, False, False, False]
    ProviderHealth.objects.create(provider=server, status="online")
    with changes(actor=None, via="system"):
        set_active("chat", [Target(Provider.objects.get(pk=server.pk))])
    assert done_steps(admin) == [True, True, True, False, False]


def test_the_built_in_echo_is_no_step_on_the_way(admin: Client) -> None:
    make_echo()
    assert done_steps(admin) == [False] * 5
