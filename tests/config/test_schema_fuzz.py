"""Requests made from our own schema, right ones and wrong ones: every answer is one that the schema tells of."""

from __future__ import annotations

import functools
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import transaction
from hypothesis import HealthCheck, Phase, given, settings, strategies
from hypothesis.errors import Unsatisfiable
from rest_framework.test import APIClient
from schemathesis import GenerationMode, openapi
from schemathesis.core.transport import Response
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.transport.requests import REQUESTS_TRANSPORT

from audit.changes import changes
from providers.models import Provider
from tests.support.api import V1, add_key, add_server, anybody, as_

pytestmark = [
    pytest.mark.no_database,
    pytest.mark.django_db,
    pytest.mark.timeout(400),
    pytest.mark.xdist_group("schema"),
]
EXAMPLES = int(os.environ.get("SCHEMA_EXAMPLES", "3"))
"""Requests for each operation, right and wrong ones alike; set it higher to look longer."""
NOWHERE = "http://127.0.0.1:9"
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


SCHEMA = (Path(django_settings.BASE_DIR) / "openapi.yaml").read_text()
COLLECTIONS = sorted(set(re.findall(r"^  /api/v1/([^/:]+)", SCHEMA, re.MULTILINE)))
"""The first words of the control plane's paths, without reading the whole schema in everybody who only looks for tests."""


@functools.cache
def operations() -> dict[str, list[Any]]:
    """The control plane's operations by the first word of their paths."""
    raw = yaml.load(SCHEMA, yaml.CSafeLoader)
    # What applications call is no Django view; its tests are those of the SDKs.
    raw["paths"] = {path: item for path, item in raw["paths"].items() if path.startswith("/api/")}
    schema = openapi.from_dict(raw)
    found: dict[str, list[Any]] = {}
    for each in schema.get_all_operations():
        operation: Any = each.ok()  # type: ignore[union-attr]  # a schema that is wrong fails right here
        found.setdefault(operation.path.split("/")[3], []).append(operation)
    return found


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
def _impatient(settings: Any) -> None:
    settings.TEST_TIMEOUT_SECONDS = 0.5
    settings.AXES_ENABLED = False


@pytest.mark.parametrize("collection", COLLECTIONS)
def test_every_answer_is_one_that_the_schema_tells_of(
    collection: str, ids: dict[str, Any], bearer: str
) -> None:
    client = anybody()
    client.credentials(HTTP_AUTHORIZATION=f"Bearer {bearer}")
    for operation in operations()[collection]:
        for mode in GenerationMode:
            ask(operation, mode, client, ids.get(collection, 1))


def ask(operation: Any, mode: GenerationMode, client: APIClient, existing: int) -> None:
    """Make requests of this operation, each of which is undone; every second one is about what exists."""

    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), real=strategies.booleans())
    def each(case: Any, real: bool) -> None:
        if real and "id" in case.path_parameters:
            case.path_parameters["id"] = existing
        if operation.path.endswith("/test-direct") and isinstance(case.body, dict):
            # Whom it dials is the caller's choice, and here nobody is dialled but ourselves.
            case.body["base_url"] = NOWHERE
        with transaction.atomic():
            response = send(client, case)
            transaction.set_rollback(True)
        assert response.status_code != 500, response.content
        case.validate_response(response, checks=CHECKS)

    with suppress(Unsatisfiable):  # where nothing is asked for, nothing can be wrong
        each()


def send(client: APIClient, case: Any) -> Response:
    """Send the request in this process and thread, so that it is part of the test's transaction."""
    request = requests.Request(
        **REQUESTS_TRANSPORT.serialize_case(case, base_url="http://testserver")
    ).prepare()
    headers = {name: str(value) for name, value in request.headers.items() if name != "Content-Length"}
    kind = headers.pop("Content-Type", "")
    address = (request.url or "").removeprefix("http://testserver")
    body: Any = request.body or b""
    got: Any = client.generic(request.method or "", address, body, content_type=kind, headers=headers)
    return Response(
        status_code=got.status_code,
        headers={name.lower(): [value] for name, value in got.headers.items()},
        content=b"".join(got.streaming_content) if got.streaming else got.content,
        request=request,
        elapsed=0.0,
        verify=True,
    )


def test_every_collection_is_asked() -> None:
    assert set(COLLECTIONS) == set(operations())
