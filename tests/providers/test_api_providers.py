"""What can only be done over the network, and health: tests, discovery and overrides, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from django.contrib.auth.models import User

from audit.models import Entry
from providers.models import Provider, ProviderHealth
from tests.support.api import KEY, V1, add_key, add_server, as_, error
from tests.support.ports import closed_port
from tests.support.upstream import Upstream

pytestmark = pytest.mark.django_db


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


def test_a_server_is_tested_and_the_test_counts_like_a_probe(operator: User, upstream: Upstream) -> None:
    client = as_(operator)
    made = add_server(client, kind="openai-compatible", base_url=f"{upstream.url}/v1", api_key=KEY)

    response = client.post(f"{V1}/servers/{made['id']}/test")

    assert response.status_code == 200
    seen = response.json()
    assert set(seen) == {"status", "status_code", "latency_ms", "detail", "models"}
    assert (seen["status"], seen["status_code"], seen["detail"]) == ("online", 200, "2 models")
    assert seen["models"]
    assert KEY not in json.dumps(seen)
    after = client.get(f"{V1}/servers/{made['id']}").json()
    assert (after["status"], after["health_status"]) == ("online", "healthy")
    assert after["last_tested_at"] is not None


def test_a_test_answers_200_whatever_its_result(operator: User) -> None:
    client = as_(operator)
    with closed_port() as port:
        made = add_server(client, base_url=f"http://127.0.0.1:{port}")
        seen = client.post(f"{V1}/servers/{made['id']}/test").json()

    assert (seen["status"], seen["status_code"], seen["models"]) == ("unreachable", None, [])
    assert seen["detail"]
    assert client.get(f"{V1}/servers/{made['id']}").json()["consecutive_failures"] == 1


def test_a_provider_is_tested_without_being_saved(operator: User, upstream: Upstream) -> None:
    client = as_(operator)
    before = Provider.objects.count()
    body = {"name": "trial", "base_url": f"{upstream.url}/v1", "api_key": KEY, "models": ["a"]}

    response = client.post(f"{V1}/providers/test-direct", body)

    assert response.status_code == 200, response.content
    assert response.json()["status"] == "online"
    assert Provider.objects.count() == before
    noted = Entry.objects.get(username="operator")
    assert (noted.action, noted.entity_type, noted.entity_id) == ("test_server", "ai_server", "")
    assert noted.changes["base_url"] == [None, f"{upstream.url}/v1"]
    assert KEY not in json.dumps(noted.changes) and noted.changes["fingerprint"][1]
    sent = upstream.ledger.last.headers
    assert KEY in json.dumps({str(name): str(value) for name, value in dict(sent).items()})
    assert KEY not in response.content.decode()


def test_what_is_only_tried_out_needs_no_name_and_may_have_a_stored_one(
    operator: User, upstream: Upstream
) -> None:
    client = as_(operator)
    url = f"{upstream.url}/v1"
    made = add_server(client, base_url=url)

    for body in ({"base_url": url}, {"base_url": url, "name": made["name"], "slug": made["slug"]}):
        response = client.post(f"{V1}/providers/test-direct", body)
        assert response.status_code == 200, response.content
        assert response.json()["status"] == "online"


def test_a_test_reads_no_secret_that_is_kept_elsewhere_for_an_operator(
    operator: User, upstream: Upstream
) -> None:
    body = {"base_url": f"{upstream.url}/v1", "api_key": "env://HOME"}

    assert as_(operator).post(f"{V1}/providers/test-direct", body).status_code == 403


def test_a_key_is_tested_and_valid_says_whether_it_is_taken(owner: User, upstream: Upstream) -> None:
    vendor = Provider.objects.get(slug="openai")
    client = as_(owner)
    client.patch(f"{V1}/providers/{vendor.pk}", {"allow_private": True, "base_url": f"{upstream.url}/v1"})
    path = f"{V1}/api-keys/{add_key(client)['id']}/test"

    taken = client.post(path).json()

    assert (taken["valid"], taken["status"]) == (True, "online")


def test_the_models_of_a_server_are_asked_for_once(operator: User, viewer: User, upstream: Upstream) -> None:
    made = add_server(as_(operator), kind="openai-compatible", base_url=f"{upstream.url}/v1")
    path = f"{V1}/servers/{made['id']}/models"

    assert as_(viewer).get(path).json()["models"] == []
    first = as_(operator).get(path).json()
    second = as_(viewer).get(path).json()

    assert first["cached"] is False
    assert {"id", "purposes", "context_window"} <= set(first["models"][0])
    assert second["cached"] is True
    assert second["models"] == first["models"]


def test_a_server_that_cannot_be_asked_for_its_models_is_a_provider_error(operator: User) -> None:
    with closed_port() as port:
        made = add_server(as_(operator), base_url=f"http://127.0.0.1:{port}")
        response = as_(operator).get(f"{V1}/servers/{made['id']}/models")

    assert response.status_code == 502
    assert error(response)["code"] == "PROVIDER_ERROR"


def test_health_is_overridden_and_the_override_lifted(operator: User, viewer: User) -> None:
    made = add_server(as_(operator))
    path = f"{V1}/providers/{made['id']}/health"
    ProviderHealth.objects.create(provider_id=made["id"], consecutive_failures=2, status="timeout")

    down = as_(operator).patch(path, {"is_healthy": False}).json()
    lifted = as_(operator).patch(path, {"is_healthy": None}).json()

    assert (down["is_healthy"], down["health_status"], down["consecutive_failures"]) == (False, "down", 0)
    assert down["override"] is False
    assert lifted["override"] is None
    assert as_(viewer).get(path).json() == lifted
    assert as_(viewer).patch(path, {"is_healthy": True}).status_code == 403


@pytest.mark.parametrize("body", [{}, {"is_healthy": "perhaps"}, {"is_healthy": True, "colour": 1}, []])
def test_a_wrong_override_is_refused(operator: User, body: Any) -> None:
    made = add_server(as_(operator))

    assert as_(operator).patch(f"{V1}/providers/{made['id']}/health", body).status_code == 400


def test_a_vendor_is_added_with_its_public_address(operator: User) -> None:
    response = as_(operator).post(
        f"{V1}/providers", {"name": "Second OpenAI", "kind": "openai", "api_key": KEY}
    )

    assert response.status_code == 201, response.content
    assert response.json()["base_url"].startswith("https://api.openai.com")
    missing = as_(operator).post(f"{V1}/providers", {"name": "Nowhere"})
    assert error(missing)["details"].keys() == {"base_url"}
