"""The models of a provider through the API: listed every five minutes at most, and written one by one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.cache import cache

from audit.models import Entry
from providers import catalog
from providers.models import UpstreamModel
from tests.support.api import V1, add_server, as_, error
from tests.support.ports import closed_port
from tests.support.upstream import Upstream

pytestmark = pytest.mark.django_db
SLASHED = "meta-llama/Llama-3.1:8b"


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    cache.clear()


@pytest.fixture
def made(operator: User, upstream: Upstream) -> dict[str, Any]:
    return add_server(as_(operator), kind="openai-compatible", base_url=f"{upstream.url}/v1")


def test_a_list_is_asked_for_once_in_five_minutes(
    operator: User, upstream: Upstream, made: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"

    first, second = client.get(path).json(), client.get(path).json()
    asked = len(upstream.ledger)
    refreshed = client.post(f"{path}/refresh").json()
    cache.clear()  # what five minutes do
    later = client.get(path).json()

    assert [answer["cached"] for answer in (first, second, refreshed, later)] == [False, True, False, False]
    assert asked == 1
    assert second["fetched_at"] == first["fetched_at"] < refreshed["fetched_at"] <= later["fetched_at"]
    assert second["models"] == first["models"] and first["models"]


def test_r39_looking_at_the_models_stores_nothing(operator: User, made: dict[str, Any]) -> None:
    before = Entry.objects.count()

    assert as_(operator).get(f"{V1}/servers/{made['id']}/models").json()["models"]

    assert (Entry.objects.count(), UpstreamModel.objects.count()) == (before, 0)
    as_(operator).post(f"{V1}/servers/{made['id']}/models/refresh")
    assert UpstreamModel.objects.exists()


def test_a_changed_address_is_asked_anew(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/servers/{made['id']}"
    client.get(f"{path}/models")
    with Upstream() as other:
        client.patch(path, {"base_url": f"{other.url}/v1"})
        assert client.get(f"{path}/models").json()["cached"] is False


def test_a_provider_that_does_not_answer_is_not_asked_by_everybody(operator: User, settings: Any) -> None:
    client = as_(operator)
    with closed_port() as port:
        made = add_server(client, base_url=f"http://127.0.0.1:{port}", models=["known"])
        path = f"{V1}/servers/{made['id']}/models"
        answers = [client.get(path).json() for _ in range(2)]

    assert [model["id"] for answer in answers for model in answer["models"]] == ["known", "known"]
    assert catalog.recall(UpstreamModel.objects.get().provider) is not None


def test_a_model_is_added_described_disabled_and_taken_away(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"

    added = client.post(path, {"id": SLASHED, "purposes": ["chat"], "context_window": 8192})
    one = f"{path}/{SLASHED}"
    changed = client.patch(one, {"context_window": 131072, "enabled": False})
    listed = client.get(path).json()["models"]
    gone = client.delete(one, headers={"If-Match": changed["ETag"]})

    assert added.status_code == 201, added.content
    assert added.json() == {
        "id": SLASHED,
        "purposes": ["chat"],
        "context_window": 8192,
        "dimensions": None,
        "capabilities": [],
        "enabled": True,
        "source": "manual",
    }
    assert (changed.json()["context_window"], changed.json()["enabled"]) == (131072, False)
    assert SLASHED not in {model["id"] for model in listed}
    assert (gone.status_code, client.get(one).status_code) == (204, 404)
    actions = list(Entry.objects.filter(entity_type="model").order_by("seq").values_list("action", flat=True))
    assert actions == ["add_model", "update_model", "delete_model"]


def test_a_listed_model_that_is_taken_away_does_not_come_back(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"
    name = client.post(f"{path}/refresh").json()["models"][0]["id"]

    assert client.delete(f"{path}/{name}").status_code == 204
    again = client.post(f"{path}/refresh").json()["models"]

    assert name not in {model["id"] for model in again}
    assert client.patch(f"{path}/{name}", {"enabled": True}).json()["source"] == "discovered"


def test_what_a_person_wrote_is_not_changed_by_what_the_provider_tells(
    operator: User, made: dict[str, Any]
) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"
    name = client.post(f"{path}/refresh").json()["models"][0]["id"]

    described = client.patch(f"{path}/{name}", {"context_window": 77}).json()
    client.post(f"{path}/refresh")

    assert described["source"] == "manual"
    assert client.get(f"{path}/{name}").json()["context_window"] == 77


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "id"),
        ({"id": "x", "colour": 1}, "colour"),
        ({"id": "x", "purposes": ["singing"]}, "purposes.0"),
        ({"id": "x", "source": "discovered"}, "source"),
        ({"id": "x", "context_window": 0}, "context_window"),
    ],
)
def test_a_wrong_model_is_refused_and_named(
    operator: User, made: dict[str, Any], body: dict[str, Any], field: str
) -> None:
    response = as_(operator).post(f"{V1}/providers/{made['id']}/models", body)

    assert response.status_code == 400
    assert set(error(response)["details"]) == {field}


def test_a_model_is_there_once_and_keeps_its_name(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"
    client.post(path, {"id": "x"})

    assert error(client.post(path, {"id": "x"}))["details"].keys() == {"id"}
    assert error(client.patch(f"{path}/x", {"id": "y"}))["details"].keys() == {"id"}
    assert client.patch(f"{path}/x", {"id": "x"}).status_code == 200


def test_a_model_that_changed_meanwhile_is_412(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}/models"
    seen = client.post(path, {"id": "x"})["ETag"]
    client.patch(f"{path}/x", {"context_window": 5})

    late = client.patch(f"{path}/x", {"context_window": 6}, headers={"If-Match": seen})

    assert late.status_code == 412
    assert client.get(f"{path}/x").json()["context_window"] == 5


def test_models_written_with_their_provider_change_its_version(operator: User, made: dict[str, Any]) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}"
    seen = client.get(path)["ETag"]
    client.patch(path, {"models": ["a"]})

    late = client.patch(path, {"models": ["b"]}, headers={"If-Match": seen})

    assert late.status_code == 412
    assert client.get(path).json()["models"] == ["a"]


def test_a_model_that_somebody_else_added_is_not_overwritten_with_the_provider(
    operator: User, made: dict[str, Any]
) -> None:
    client, path = as_(operator), f"{V1}/providers/{made['id']}"
    seen = client.get(path)
    client.post(f"{path}/models", {"id": "added"})

    late = client.put(path, {**seen.json(), "priority": 3}, headers={"If-Match": seen["ETag"]})

    assert late.status_code == 412
    assert client.get(path).json()["models"] == ["added"]
