"""Requests made from our own schema, right ones and wrong ones: every answer is one that the schema tells of."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.core.wsgi import get_wsgi_application
from django.db import transaction
from hypothesis import HealthCheck, Phase, given, settings, strategies
from schemathesis import Case, GenerationMode, openapi
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from audit.changes import changes
from providers.models import Provider
from tests.support.api import V1, add_key, add_server, anybody, as_

pytestmark = pytest.mark.django_db
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "8"))
"""Requests for each operation and kind; `make soak` makes more."""
NOWHERE = "http://127.0.0.1:9"
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def operations() -> list[Any]:
    raw = yaml.safe_load((Path(django_settings.BASE_DIR) / "openapi.yaml").read_text())
    # What applications call is no Django view; its tests are those of the SDKs.
    raw["paths"] = {path: item for path, item in raw["paths"].items() if path.startswith("/api/")}
    schema = openapi.from_dict(raw)
    schema.app = get_wsgi_application()
    return [found.ok() for found in schema.get_all_operations()]


OPERATIONS = operations()


@pytest.fixture
def ids(owner: User) -> dict[str, Any]:
    """One thing of each kind; nothing listens where they point."""
    client = as_(owner)
    server = add_server(client, models=["meta/tiny"])["id"]
    key = add_key(client)["id"]
    with changes(actor=None, via="system"):
        Provider.objects.filter(kind="llamacpp").update(base_url=NOWHERE)
        Provider.objects.exclude(pk=server).update(base_url="https://127.0.0.1:9")
    client.put(f"{V1}/active/chat", {"provider_type": "ai_server", "provider_id": server})
    route = client.post(f"{V1}/model-routes", {"name": "fast", "nodes": [{"provider_id": server}]})
    gateway = client.post(f"{V1}/gateway-keys", {"name": "app"})
    return {
        "servers": server,
        "providers": server,
        "api-keys": key,
        "model-routes": route.json()["id"],
        "gateway-keys": gateway.json()["id"],
        "audit": 1,
    }


@pytest.fixture
def bearer(owner: User) -> str:
    body = {"username": owner.username, "password": "correct horse battery"}
    return str(anybody().post(f"{V1}/auth/token", body).json()["access"])


@pytest.fixture(autouse=True)
def _impatient(settings: Any) -> Iterator[None]:
    settings.TEST_TIMEOUT_SECONDS = 0.5
    settings.AXES_ENABLED = False
    yield


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda found: found.label.replace("/api/v1/", ""))
def test_every_answer_is_one_that_the_schema_tells_of(
    operation: Any, mode: GenerationMode, ids: dict[str, Any], bearer: str
) -> None:
    existing = ids.get(operation.path.split("/")[3], 1)

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=strategies.booleans())
    def ask(case: Case, real: bool) -> None:
        if real and "id" in case.path_parameters:
            case.path_parameters["id"] = existing
        if operation.path.endswith("/test-direct") and isinstance(case.body, dict):
            # Whom it dials is the caller's choice, and here nobody is dialled but ourselves.
            case.body["base_url"] = NOWHERE
        with transaction.atomic():
            response = case.call(headers={"Authorization": f"Bearer {bearer}"})
            transaction.set_rollback(True)
        assert response.status_code != 500, response.text
        case.validate_response(response, checks=CHECKS)

    ask()


