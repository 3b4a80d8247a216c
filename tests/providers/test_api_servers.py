"""Servers through the API: as their clients know them, checked when saved, and never telling their key."""

from __future__ import annotations

import json

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext

from audit.changes import changes
from audit.models import Entry
from providers import keys
from providers.models import ApiKey, Provider, ProviderHealth, UpstreamModel
from tests.support.api import KEY, V1, add_server, as_, error

pytestmark = pytest.mark.django_db


def test_a_server_is_made_read_changed_and_deleted(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, models=["tiny", {"id": "big", "context_window": 4096}], use_for_embeddings=True)
    path = f"{V1}/servers/{made['id']}"

    assert made["slug"] == "llama"
    assert made["server_type"] == made["kind"] == "llamacpp"
    assert made["models"] == ["big", "tiny"]
    assert made["created_by"] == "operator"
    assert client.get(path).json() == made
    changed = client.patch(path, {"priority": 5}).json()
    assert (changed["priority"], changed["use_for_embeddings"]) == (5, True)
    assert client.delete(path).status_code == 204
    assert client.get(path).status_code == 404


def test_a_server_that_was_never_probed_is_unknown(operator: User) -> None:
    made = add_server(as_(operator))

    assert (made["status"], made["health_status"], made["is_healthy"]) == ("unknown", "unknown", True)
    assert made["last_health_check"] is None
    assert not ProviderHealth.objects.exists()


def test_kind_and_slug_have_defaults(operator: User) -> None:
    response = as_(operator).post(
        f"{V1}/servers", {"name": "My GPU box", "base_url": "http://localhost:8001/v1/"}
    )

    assert response.status_code == 201
    assert response.json()["kind"] == "openai-compatible"
    assert response.json()["slug"] == "my-gpu-box"
    assert response.json()["base_url"] == "http://localhost:8001/v1"


@pytest.mark.parametrize("mount", ["/api/v1", "/api/v1/llm-config", "/api"])
@pytest.mark.parametrize("slash", ["", "/"])
def test_every_mount_answers_with_and_without_a_slash(viewer: User, mount: str, slash: str) -> None:
    client = as_(viewer)

    for name in ("servers", "api-keys", "active", "providers", "health"):
        assert client.get(f"{mount}/{name}{slash}").status_code == 200


def test_the_seed_names_are_accepted_and_returned(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, is_active=False, server_type="ollama", kind="ollama")

    assert (made["is_active"], made["enabled"], made["server_type"]) == (False, False, "ollama")
    assert made["last_tested_at"] is None
    assert client.patch(f"{V1}/servers/{made['id']}", {"is_active": True}).json()["enabled"] is True


def test_an_edited_alias_wins_over_the_name_that_was_sent_back_unchanged(operator: User) -> None:
    client = as_(operator)
    made = add_server(client)
    path = f"{V1}/servers/{made['id']}"

    assert client.put(path, {**made, "is_active": False}).json()["enabled"] is False
    read = client.get(path).json()
    assert client.put(path, {**read, "enabled": True}).json()["is_active"] is True


def test_an_alias_that_contradicts_is_refused(operator: User) -> None:
    body = {"name": "x", "base_url": "http://127.0.0.1:9", "kind": "vllm", "server_type": "ollama"}
    response = as_(operator).post(f"{V1}/servers", body)

    assert response.status_code == 400
    assert "server_type" in error(response)["details"]


def test_an_unknown_field_is_named(operator: User) -> None:
    response = as_(operator).post(
        f"{V1}/servers", {"name": "x", "base_url": "http://127.0.0.1:9", "colour": "red"}
    )

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"colour"}
    assert not Provider.objects.filter(name="x").exists()


def test_a_whole_object_sent_back_changes_nothing(operator: User) -> None:
    client = as_(operator)
    made = add_server(client)
    path = f"{V1}/servers/{made['id']}"
    before = client.get(path)
    ProviderHealth.objects.create(provider_id=made["id"], status="online", latency_ms=3.5)

    response = client.put(path, before.json())

    assert response.status_code == 200, response.content
    assert response["ETag"] == before["ETag"]
    assert response.json()["status"] == "online"


@pytest.mark.parametrize(
    "field", ["id", "masked_key", "created_at", "created_by", "health_status", "latency_ms"]
)
def test_a_changed_read_only_field_is_refused(operator: User, field: str) -> None:
    client = as_(operator)
    path = f"{V1}/servers/{add_server(client)['id']}"

    response = client.patch(path, {field: 77})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {field}


def test_the_etag_is_the_version_and_health_does_not_change_it(operator: User) -> None:
    client = as_(operator)
    made = add_server(client)
    path = f"{V1}/servers/{made['id']}"
    tag = client.get(path)["ETag"]
    ProviderHealth.objects.create(provider_id=made["id"], consecutive_failures=2)
    assert client.get(path)["ETag"] == tag

    assert client.patch(path, {"priority": 1}, headers={"If-Match": tag}).status_code == 200
    assert client.get(path)["ETag"] != tag
    response = client.patch(path, {"priority": 2}, headers={"If-Match": tag})

    assert response.status_code == 412
    assert error(response)["code"] == "PRECONDITION_FAILED"
    assert Provider.objects.get(pk=made["id"]).priority == 1
    assert client.delete(path, headers={"If-Match": tag}).status_code == 412
    assert client.delete(path, headers={"If-Match": "*"}).status_code == 204


def test_only_the_enabled_ones_are_listed_when_asked_for(viewer: User, operator: User) -> None:
    add_server(as_(operator), name="on")
    add_server(as_(operator), name="off", enabled=False)

    def names(query: str) -> list[str]:
        return [row["name"] for row in as_(viewer).get(f"{V1}/servers{query}").json()["results"]]

    assert names("") == ["on", "off"]
    assert names("?enabled_only=true") == ["on"]
    assert names("?search=of") == ["off"]
    assert names("?ordering=-id") == ["off", "on"]
    assert names("?is_active=false") == ["off"]


def test_vendors_are_no_servers(viewer: User) -> None:
    vendor = Provider.objects.get(slug="openai")

    assert as_(viewer).get(f"{V1}/servers/{vendor.pk}").status_code == 404
    assert as_(viewer).get(f"{V1}/providers/{vendor.pk}").status_code == 200


def test_a_list_page_takes_few_queries_however_many_rows_it_has(viewer: User) -> None:
    with changes(actor=None, via="system"):
        for number in range(30):
            row = Provider.objects.create(name=f"s{number}", kind="vllm", base_url="http://127.0.0.1:9")
            UpstreamModel.objects.create(provider=row, name="m")
            keys.write_default(row, KEY)
            ProviderHealth.objects.create(provider=row)
    client = as_(viewer)

    for name in ("servers", "providers"):
        with CaptureQueriesContext(
            connection,
        ) as queries:
            response = client.get(f"{V1}/{name}?page_size=200")
        assert response.json()["count"] >= 30
        assert len(queries) <= 12, [query["sql"] for query in queries]


# -- the key -----------------------------------------------------------------------------------------------------------


def test_r08_no_answer_holds_the_key_and_empty_keeps_it(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)
    path = f"{V1}/servers/{made['id']}"
    answers = [
        made,
        client.get(path).json(),
        client.get(f"{V1}/servers").json(),
        client.get(f"{V1}/providers").json(),
    ]
    for body in ({"api_key": ""}, {"api_key": None}, {"priority": 3}):
        answers.append(client.patch(path, body).json())
    answers.append(client.options(path).json())

    key = ApiKey.objects.get(provider_id=made["id"])
    assert made["masked_key"] == f"****{KEY[-4:]}"
    assert keys.opened(key).reveal() == KEY
    assert KEY not in json.dumps(answers)
    assert KEY not in json.dumps(list(Entry.objects.values_list("changes", flat=True)))


@pytest.mark.parametrize("masked", ["****cdef", "••••cdef", "…cdef"])
def test_r08_masked_text_is_never_stored(operator: User, masked: str) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)

    response = client.patch(f"{V1}/servers/{made['id']}", {"api_key": masked})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"api_key"}
    assert keys.opened(ApiKey.objects.get(provider_id=made["id"])).reveal() == KEY


@pytest.mark.parametrize("moved", ["https://127.0.0.1:9", "http://127.0.0.2:9", "http://127.0.0.1:10"])
def test_r25_a_moved_server_needs_its_key_again(operator: User, moved: str) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)
    path = f"{V1}/servers/{made['id']}"

    for body in ({"base_url": moved}, {"base_url": moved, "api_key": ""}):
        response = client.patch(path, body)
        assert response.status_code == 400
        assert set(error(response)["details"]) == {"api_key"}
    assert client.get(path).json()["base_url"] == "http://127.0.0.1:9"

    assert client.patch(path, {"base_url": moved, "api_key": "sk-another-0123456789"}).status_code == 200
    key = ApiKey.objects.select_related("provider").get(provider_id=made["id"])
    assert keys.opened(key).reveal() == "sk-another-0123456789"
    entry = Entry.objects.get(action="update_server")
    assert entry.changes["base_url"] == ["http://127.0.0.1:9", moved]
    assert (entry.username, entry.via) == ("operator", "api")


def test_r25_keys_that_did_not_come_along_are_disabled(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)
    with changes(actor=None, via="system"):
        left = ApiKey(provider_id=made["id"], name="second")
        keys.add(left, "sk-second-0123456789")

    client.patch(
        f"{V1}/servers/{made['id']}", {"base_url": "http://127.0.0.1:10", "api_key": "sk-new-0123456789"}
    )

    left.refresh_from_db()
    assert left.enabled is False


def test_r25_another_path_on_the_same_origin_needs_no_key(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)

    response = client.patch(f"{V1}/servers/{made['id']}", {"base_url": "http://127.0.0.1:9/v1"})

    assert response.status_code == 200
    assert keys.opened(ApiKey.objects.select_related("provider").get(provider_id=made["id"])).reveal() == KEY


def test_only_an_administrator_refers_to_a_secret_kept_elsewhere(operator: User, owner: User) -> None:
    body = {"name": "x", "base_url": "http://127.0.0.1:9", "api_key": "env://UPSTREAM_KEY"}

    assert as_(operator).post(f"{V1}/servers", body).status_code == 403
    response = as_(owner).post(f"{V1}/servers", body)
    assert response.status_code == 201
    assert response.json()["masked_key"] == "env://UPSTREAM_KEY"


# -- what is refused when saved ----------------------------------------------------------------------------------------

R22 = [
    "http://0/", "http://0.0.0.0", "http://2852039166", "http://0xa9fea9fe", "http://0251.0376.0251.0376",
    "http://169.254.43518", "http://169.254.169.254", "http://[::ffff:169.254.169.254]", "http://[64:ff9b::a9fe:a9fe]",
    "http://[2002:a9fe:a9fe::]", "http://[fe80::1%25eth0]", "http://169.254.169.254.", "http://①⑥⑨。②⑤④。①⑥⑨。②⑤④",
    "http://ok@169.254.169.254", "file:///etc/passwd", "gopher://127.0.0.1", "unix:/run/x.sock",
    "http://metadata.google.internal", "http://100.100.100.200", "http://[fd00:ec2::254]",
]  # fmt: skip


@pytest.mark.parametrize("url", R22)
def test_r19_r22_a_forbidden_address_is_refused_when_saved(operator: User, url: str) -> None:
    client = as_(operator)
    made = add_server(client)

    for response in (
        client.post(f"{V1}/servers", {"name": "trap", "base_url": url}),
        client.patch(f"{V1}/servers/{made['id']}", {"base_url": url}),
        client.post(f"{V1}/providers/test-direct", {"name": "trap", "base_url": url}),
    ):
        assert response.status_code == 400, url
        assert set(error(response)["details"]) == {"base_url"}
    assert not Provider.objects.filter(name="trap").exists()


@pytest.mark.parametrize(
    "url", ["http://x:abc", "http://x:99999", "http://[::1", "nonsense", "http://", "", "http://a b", 7]
)
def test_an_address_that_is_none_is_refused(operator: User, url: object) -> None:
    client = as_(operator)
    made = add_server(client, api_key=KEY)

    response = client.patch(f"{V1}/servers/{made['id']}", {"base_url": url, "api_key": KEY})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"base_url"}


@pytest.mark.parametrize(
    "headers",
    [
        {"X-A": "a\r\nB: c"}, {"X-A": "a\nb"}, {"X-A": "a\u0007"}, {"X:A": "b"}, {"": "b"}, {"X-A": "\u4e2d"},
        {"Host": "x"}, {"Content-Length": "1"}, {"Transfer-Encoding": "chunked"}, {"Connection": "close"}, {"TE": "x"},
        {"Upgrade": "x"}, {"authorization": "x"}, {"Cookie": "x"}, {"X-Forwarded-For": "1.2.3.4"}, {"X-A": "x" * 8193},
        {f"X-{number}": "a" for number in range(33)}, {"X-A": 1}, ["X-A"], "X-A: b",
    ],
)  # fmt: skip
def test_r27_a_header_that_could_be_smuggled_is_refused_when_saved(operator: User, headers: object) -> None:
    response = as_(operator).post(
        f"{V1}/servers", {"name": "x", "base_url": "http://127.0.0.1:9", "custom_headers": headers}
    )

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"custom_headers"}


def test_allow_private_is_the_administrators_to_set(operator: User, owner: User) -> None:
    vendor = Provider.objects.get(slug="openai")
    path = f"{V1}/providers/{vendor.pk}"

    assert as_(operator).patch(path, {"allow_private": True}).status_code == 403
    assert as_(operator).patch(path, {"allow_private": False, "priority": 7}).status_code == 200
    assert as_(owner).patch(path, {"allow_private": True}).json()["allow_private"] is True
    assert Entry.objects.get(username="owner").changes["allow_private"] == [False, True]


def test_a_private_address_of_a_vendor_is_refused(operator: User) -> None:
    vendor = Provider.objects.get(slug="openai")

    response = as_(operator).patch(f"{V1}/providers/{vendor.pk}", {"base_url": "http://127.0.0.1:9"})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"base_url"}


def test_a_name_that_is_taken_is_refused_under_its_field(operator: User) -> None:
    add_server(as_(operator))
    response = as_(operator).post(f"{V1}/servers", {"name": "llama", "base_url": "http://127.0.0.1:9"})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"name"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", "tiny"), ("models", [1]), ("models", ["a", "a"]), ("models", [{"id": "a", "colour": 1}]), ("models", [""]),
        ("priority", 10**30), ("priority", "soon"), ("metadata", []), ("metadata", {"a": "x" * 17_000}),
        ("kind", "openai"), ("kind", "nope"), ("name", ""), ("name", "x" * 101), ("name", None), ("name", {"a": 1}),
        ("slug", "Not A Slug"), ("connect_timeout_seconds", 0), ("idle_timeout_seconds", 1e9),
        ("probe_interval_seconds", 86401), ("probe_interval_seconds", "NaN"), ("ca_pem", "not a certificate"), ("ca_pem", "\u00e9"), ("enabled", "perhaps"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(operator: User, field: str, value: object) -> None:
    body = {"name": "x", "base_url": "http://127.0.0.1:9", field: value}
    response = as_(operator).post(f"{V1}/servers", body)

    assert response.status_code == 400, response.content
    assert {name.split(".")[0] for name in error(response)["details"]} == {field}
    assert not Provider.objects.filter(base_url="http://127.0.0.1:9").exists()


def test_models_that_are_left_out_go_and_found_ones_stay_disabled(operator: User) -> None:
    client = as_(operator)
    made = add_server(client, models=["by-hand"])
    with changes(actor=None, via="system"):
        UpstreamModel.objects.create(provider_id=made["id"], name="found", source="discovered")

    changed = client.patch(f"{V1}/servers/{made['id']}", {"models": ["other"]}).json()

    assert changed["models"] == ["other"]
    assert set(UpstreamModel.objects.values_list("name", "enabled")) == {("found", False), ("other", True)}
