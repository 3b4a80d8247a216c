"""The active provider of each purpose through the API."""

from __future__ import annotations

from typing import Any

import pytest
from django.contrib.auth.models import User

from audit.models import Entry
from providers.models import ActiveProvider, Provider
from tests.support.api import V1, add_key, add_server, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/active"


@pytest.fixture
def targets(operator: User) -> dict[str, dict[str, Any]]:
    """A server, a vendor and a key of it, as the API names them."""
    server = add_server(as_(operator), use_for_embeddings=True)
    key = add_key(as_(operator))
    vendor = Provider.objects.get(slug="openai").pk
    return {
        "server": {"provider_type": "ai_server", "provider_id": server["id"]},
        "vendor": {"provider_type": "provider", "provider_id": vendor, "model": "gpt-4o"},
        "key": {"provider_type": "api_key", "provider_id": key["id"]},
    }


def test_nothing_is_active_at_first(viewer: User) -> None:
    assert as_(viewer).get(PATH).json() == {"chat": None, "embeddings": None, "reranking": None}
    assert as_(viewer).get(f"{PATH}/chat").status_code == 404


def test_a_provider_with_fallbacks_is_made_active(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    body = {"purpose": "chat", **targets["server"], "fallbacks": [targets["vendor"], targets["key"]]}

    response = client.post(PATH, body)

    assert response.status_code == 200, response.content
    answer = response.json()
    assert (answer["purpose"], answer["provider_type"], answer["model"]) == ("chat", "ai_server", None)
    assert answer["provider_name"] == "llama"
    assert [(each["provider_type"], each["model"]) for each in answer["fallbacks"]] == [
        ("provider", "gpt-4o"),
        ("api_key", None),
    ]
    assert client.get(f"{PATH}/chat").json() == answer
    assert client.get(PATH).json() == {"chat": answer, "embeddings": None, "reranking": None}
    entry = Entry.objects.get(action="set_active")
    assert (entry.entity_type, entry.entity_id, entry.username) == ("active_provider", "chat", "operator")


def test_an_answer_may_be_edited_and_sent_back(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    answer = client.put(f"{PATH}/chat", {**targets["vendor"], "fallbacks": [targets["server"]]}).json()

    response = client.put(f"{PATH}/chat", {**answer, "fallbacks": []})

    assert response.json()["fallbacks"] == []
    assert response.json()["model"] == "gpt-4o"


def test_it_is_cleared(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    client.put(f"{PATH}/chat", targets["server"])

    assert client.delete(f"{PATH}/chat").status_code == 204
    assert not ActiveProvider.objects.exists()
    assert client.delete(f"{PATH}/chat").status_code == 404


def test_a_stale_edit_is_refused(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    tag = client.put(f"{PATH}/chat", targets["server"])["ETag"]
    client.put(f"{PATH}/chat", targets["vendor"])

    for response in (
        client.put(f"{PATH}/chat", targets["server"], headers={"If-Match": tag}),
        client.post(PATH, {"purpose": "chat", **targets["server"]}, headers={"If-Match": tag}),
        client.delete(f"{PATH}/chat", headers={"If-Match": tag}),
    ):
        assert response.status_code == 412
    assert client.get(f"{PATH}/chat").json()["provider_type"] == "provider"


def test_a_type_must_fit_its_id(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    wrong = [
        {**targets["server"], "provider_type": "provider"},
        {**targets["vendor"], "provider_type": "ai_server"},
        {"provider_type": "api_key", "provider_id": 999},
        {"provider_type": "provider", "provider_id": 10**18},
    ]
    for body in wrong:
        response = client.put(f"{PATH}/chat", body)
        assert response.status_code == 400
        assert set(error(response)["details"]) == {"provider_id"}


def test_a_wrong_fallback_is_named_by_its_place(operator: User, targets: dict[str, Any]) -> None:
    body = {
        **targets["server"],
        "fallbacks": [targets["vendor"], {"provider_type": "api_key", "provider_id": 999}],
    }

    response = as_(operator).put(f"{PATH}/chat", body)

    assert set(error(response)["details"]) == {"fallbacks.1.provider_id"}
    assert not ActiveProvider.objects.exists()


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"purpose": "singing"}, "purpose"), ({"purpose": "embeddings"}, "purpose"), ({"provider_type": "x"}, "provider_type"),
        ({"provider_id": "llama"}, "provider_id"), ({"provider_id": None}, "provider_id"), ({"fallbacks": "x"}, "fallbacks"),
        ({"colour": 1}, "colour"), ({"model": "x" * 300}, "model"), ({"fallbacks": [1]}, "fallbacks"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_refused_under_its_field(
    operator: User, targets: dict[str, Any], change: dict[str, Any], field: str
) -> None:
    response = as_(operator).put(f"{PATH}/chat", {**targets["server"], **change})

    assert response.status_code == 400, response.content
    assert {name.split(".")[0] for name in error(response)["details"]} == {field}
    assert not ActiveProvider.objects.exists()


def test_a_target_may_not_stand_there_twice(operator: User, targets: dict[str, Any]) -> None:
    response = as_(operator).put(f"{PATH}/chat", {**targets["server"], "fallbacks": [targets["server"]]})

    assert set(error(response)["details"]) == {"fallbacks"}


def test_a_provider_must_be_for_the_purpose(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)

    assert client.put(f"{PATH}/embeddings", targets["server"]).status_code == 200
    assert error(client.put(f"{PATH}/reranking", targets["server"]))["details"].keys() == {"provider_id"}


def test_the_purpose_is_required_where_the_path_does_not_tell_it(
    operator: User, targets: dict[str, Any]
) -> None:
    assert error(as_(operator).post(PATH, targets["server"]))["details"].keys() == {"purpose"}
    assert as_(operator).put(f"{PATH}/singing", targets["server"]).status_code == 404


def test_an_active_server_is_not_deleted(operator: User, targets: dict[str, Any]) -> None:
    client = as_(operator)
    client.put(f"{PATH}/chat", {**targets["vendor"], "fallbacks": [targets["server"]]})

    response = client.delete(f"{V1}/servers/{targets['server']['provider_id']}")

    assert response.status_code == 409
    assert error(response)["details"]["used_by"][0]["id"] == "chat"
