"""Keys of vendors through the API: written, masked, counted, and never read."""

from __future__ import annotations

import json

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.urls import reverse

from audit.changes import changes
from audit.models import Entry
from providers import keys
from providers.active import Target, set_active
from providers.models import ApiKey, KeyUse, Provider
from providers.wire import Quota
from tests.support.api import KEY, V1, add_key, add_server, as_, error

pytestmark = pytest.mark.django_db


def test_a_key_is_added_masked_and_enables_its_vendor(operator: User) -> None:
    made = add_key(as_(operator), metadata={"team": "blue"})

    assert made["masked_key"] == f"****{KEY[-4:]}"
    assert (made["provider"], made["key_name"], made["enabled"]) == ("openai", "team", True)
    assert made["is_default"] is made["use_for_ops_center"] is True
    assert (made["requests_count"], made["tokens_used"], made["cost_usd"], made["last_used_at"]) == (
        0,
        0,
        0.0,
        None,
    )
    assert "api_key" not in made
    assert Provider.objects.get(slug="openai").enabled is True
    assert Entry.objects.filter(action="add_key", username="operator", via="api").exists()


def test_the_provider_may_be_named_by_id(operator: User) -> None:
    number = Provider.objects.get(slug="groq").pk

    assert add_key(as_(operator), provider=number)["provider"] == "groq"
    assert add_key(as_(operator), provider=str(number), key_name="second")["provider"] == "groq"


def test_a_key_has_limits_of_ours_that_reach_requests(owner: User, operator: User) -> None:
    made = add_key(as_(owner), requests_per_minute=60)
    path = f"{V1}/api-keys/{made['id']}"
    assert (made["requests_per_minute"], made["tokens_per_minute"], made["max_concurrency"]) == (
        60,
        None,
        None,
    )
    changed = as_(owner).patch(path, {"tokens_per_minute": 90_000, "max_concurrency": 4}).json()
    assert (changed["tokens_per_minute"], changed["max_concurrency"]) == (90_000, 4)
    assert ApiKey.objects.get().credential().quota == Quota(60, 90_000, 4)
    assert Entry.objects.get(action="update_key").changes["tokens_per_minute"] == [None, 90_000]
    assert as_(operator).patch(path, {"max_concurrency": 5}).status_code == 403
    for wrong in (0, -1, "many", 10**12):
        assert set(error(as_(owner).patch(path, {"max_concurrency": wrong}))["details"]) == {
            "max_concurrency"
        }
    none = {"requests_per_minute": None, "tokens_per_minute": None, "max_concurrency": None}
    assert as_(owner).patch(path, none).status_code == 200
    assert ApiKey.objects.get().credential().quota is None


def test_an_operator_sees_the_limits_of_a_key_in_the_admin_and_an_administrator_sets_them(
    owner: User, operator: User
) -> None:
    made = add_key(as_(owner))
    change = reverse("admin:providers_apikey_change", args=[made["id"]])
    for who, limit in ((operator, None), (owner, 7)):
        client = Client()
        client.force_login(who)
        assert "stay below the vendor" in client.get(change).content.decode()
        body = {"name": "team", "enabled": "on", "is_default": "on", "weight": 1, "metadata": "{}"}
        assert client.post(change, {**body, "requests_per_minute": 7}).status_code == 302
        assert ApiKey.objects.get().requests_per_minute == limit


def test_what_a_key_was_used_for_is_shown(operator: User, viewer: User) -> None:
    made = add_key(as_(operator))
    KeyUse.objects.create(
        api_key_id=made["id"], requests_count=3, tokens_used=1200, cost_nanodollars=2_500_000_000
    )

    shown = as_(viewer).get(f"{V1}/api-keys/{made['id']}").json()

    assert (shown["requests_count"], shown["tokens_used"], shown["cost_usd"]) == (3, 1200, 2.5)


def test_r08_no_answer_holds_the_key_and_empty_keeps_it(owner: User) -> None:
    client = as_(owner)
    made = add_key(client)
    path = f"{V1}/api-keys/{made['id']}"
    answers = [made, client.get(path).json(), client.get(f"{V1}/api-keys?search=team").json()]
    for body in (
        {"api_key": ""},
        {"api_key": None},
        {"weight": 3},
        {"api_key": "****cdef"},
        {"api_key": {"k": KEY}},
    ):
        answers.append(client.patch(path, body).json())
    answers.append(client.put(path, {**client.get(path).json(), "weight": 4}).json())
    answers.append(client.options(path).json())

    assert keys.opened(ApiKey.objects.select_related("provider").get()).reveal() == KEY
    assert KEY not in json.dumps(answers)
    assert KEY not in json.dumps(list(Entry.objects.values_list("changes", flat=True)))


def test_a_secret_is_replaced(operator: User) -> None:
    made = add_key(as_(operator))

    response = as_(operator).patch(f"{V1}/api-keys/{made['id']}", {"api_key": "sk-next-0123456789-wxyz"})

    assert response.json()["masked_key"] == "****wxyz"
    assert keys.opened(ApiKey.objects.select_related("provider").get()).reveal() == "sk-next-0123456789-wxyz"


def test_an_operator_replaces_the_secret_and_nothing_else(operator: User, owner: User) -> None:
    made = add_key(as_(operator))
    path = f"{V1}/api-keys/{made['id']}"

    assert as_(operator).patch(path, {"enabled": False}).status_code == 403
    assert as_(operator).delete(path).status_code == 403
    assert as_(operator).put(path, {**made, "api_key": "sk-next-0123456789"}).status_code == 200
    assert as_(owner).patch(path, {"enabled": False}).json()["is_active"] is False
    assert as_(owner).delete(path).status_code == 204


def test_only_an_administrator_refers_to_a_secret_kept_elsewhere(operator: User, owner: User) -> None:
    body = {"provider": "openai", "key_name": "x", "api_key": "env://OPENAI"}

    assert as_(operator).post(f"{V1}/api-keys", body).status_code == 403
    assert as_(owner).post(f"{V1}/api-keys", body).json()["masked_key"] == "env://OPENAI"


def test_one_key_of_a_provider_is_the_default(owner: User) -> None:
    first = add_key(as_(owner))
    second = add_key(as_(owner), key_name="second", use_for_ops_center=True)

    assert second["is_default"] is True
    assert ApiKey.objects.get(pk=first["id"]).is_default is False
    again = as_(owner).patch(f"{V1}/api-keys/{first['id']}", {"is_default": True}).json()
    assert again["is_default"] is True
    assert ApiKey.objects.get(pk=second["id"]).is_default is False


def test_a_key_stays_with_its_provider(owner: User) -> None:
    made = add_key(as_(owner))
    response = as_(owner).patch(f"{V1}/api-keys/{made['id']}", {"provider": "groq"})

    assert response.status_code == 400
    assert set(error(response)["details"]) == {"provider"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("provider", "nobody"), ("provider", None), ("provider", True), ("provider", 10**18), ("provider", ["openai"]),
        ("key_name", ""), ("key_name", "x" * 101), ("api_key", ""), ("api_key", None), ("api_key", "has space"),
        ("api_key", "****cdef"), ("api_key", "line\nbreak"), ("api_key", "x" * 5000), ("api_key", "vault://a/b#c"),
        ("weight", 0), ("weight", -1), ("weight", 10**12), ("metadata", "x"), ("colour", 1), ("id", 5),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(owner: User, field: str, value: object) -> None:
    body = {"provider": "openai", "key_name": "team", "api_key": KEY, field: value}
    response = as_(owner).post(f"{V1}/api-keys", body)

    assert response.status_code == 400, response.content
    assert set(error(response)["details"]) == {field}
    assert not ApiKey.objects.exists()
    assert Provider.objects.get(slug="openai").enabled is False


def test_a_name_that_is_taken_is_refused(operator: User) -> None:
    add_key(as_(operator))
    body = {"provider": "openai", "key_name": "team", "api_key": KEY}

    assert as_(operator).post(f"{V1}/api-keys", body).status_code == 400


def test_the_keys_of_servers_are_not_among_them(operator: User) -> None:
    made = add_server(as_(operator), api_key=KEY)
    body = {"provider": made["slug"], "key_name": "x", "api_key": KEY}

    assert as_(operator).get(f"{V1}/api-keys").json()["count"] == 0
    assert error(as_(operator).post(f"{V1}/api-keys", body))["details"].keys() == {"provider"}


def test_a_key_in_use_is_not_deleted_and_it_says_where(owner: User) -> None:
    made = add_key(as_(owner))
    key = ApiKey.objects.select_related("provider").get(pk=made["id"])
    with changes(actor=None, via="system"):
        set_active("chat", [Target(key.provider, key)])

    for path in (f"{V1}/api-keys/{key.pk}", f"{V1}/providers/{key.provider_id}"):
        response = as_(owner).delete(path)
        assert response.status_code == 409
        assert error(response)["code"] == "CONFLICT"
        assert error(response)["details"]["used_by"] == [
            {"type": "active_provider", "id": "chat", "name": "Chat"}
        ]
    assert ApiKey.objects.filter(pk=key.pk).exists()


def test_filters(operator: User, viewer: User) -> None:
    add_key(as_(operator))
    add_key(as_(operator), provider="groq", enabled=False)

    def listed(query: str) -> list[str]:
        return [row["provider"] for row in as_(viewer).get(f"{V1}/api-keys{query}").json()["results"]]

    assert sorted(listed("")) == ["groq", "openai"]
    assert listed("?enabled_only=true") == ["openai"]
    assert listed("?provider=groq") == ["groq"]
    assert listed("?is_default=false") == []


def test_a_list_page_takes_few_queries_however_many_rows_it_has(viewer: User) -> None:
    vendor = Provider.objects.get(slug="openai")
    with changes(actor=None, via="system"):
        for number in range(30):
            key = ApiKey(provider=vendor, name=f"k{number}")
            keys.store(key, KEY)
            key.save()
            KeyUse.objects.create(api_key=key)
    client = as_(viewer)
    with CaptureQueriesContext(connection) as queries:
        assert client.get(f"{V1}/api-keys?page_size=200").json()["count"] == 30
    assert len(queries) <= 12, [query["sql"] for query in queries]


def test_a_vendors_first_key_given_with_the_provider_enables_it(operator: User) -> None:
    vendor = Provider.objects.get(slug="mistral")

    changed = as_(operator).patch(f"{V1}/providers/{vendor.pk}", {"api_key": KEY}).json()

    assert (changed["enabled"], changed["masked_key"]) == (True, f"****{KEY[-4:]}")
