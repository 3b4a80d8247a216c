"""The paths of the control plane, what is open without login, and the schema that describes them."""

from __future__ import annotations

import functools
from datetime import datetime
from io import StringIO
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml
from django.conf import settings
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection

from tests.support.api import V1, anybody, as_

# In one process, since the schema is made once in each.
pytestmark = [pytest.mark.django_db, pytest.mark.xdist_group("schema")]


def test_the_start_page_leads_to_the_admin() -> None:
    assert anybody().get("/")["Location"] == "/admin/"


@pytest.mark.parametrize("path", ["/ping", "/ping/"])
def test_ping(path: str) -> None:
    assert anybody().get(path).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "path", ["/api/v1/health", "/api/v1/health/", "/api/v1/llm-config/health", "/api/health"]
)
def test_health_needs_no_login(path: str) -> None:
    body = anybody().get(path).json()

    assert set(body) == {"status", "timestamp", "version", "uptime_seconds"}
    assert (body["status"], body["version"]) == ("ok", settings.VERSION)
    assert datetime.fromisoformat(body["timestamp"]).tzinfo is not None
    assert body["uptime_seconds"] >= 0


def test_health_is_degraded_while_the_database_is_away() -> None:
    from django.db import OperationalError

    def away(*args: Any) -> Any:
        raise OperationalError("gone")

    with connection.execute_wrapper(away):
        response = anybody().get(f"{V1}/health")

    assert (response.status_code, response.json()["status"]) == (200, "degraded")
    assert "gone" not in response.content.decode()


@pytest.mark.parametrize(
    "path", ["/api/schema/", "/api/schema", "/api/docs/", "/api/docs", "/api/v1/schema/"]
)
def test_schema_and_docs_need_a_login(path: str, viewer: User) -> None:
    assert anybody().get(path).status_code == 401
    assert as_(viewer).get(path).status_code == 200


def test_the_docs_come_from_our_own_files_without_inline_scripts(viewer: User) -> None:
    page = as_(viewer).get("/api/docs/", headers={"Accept": "text/html"})

    assert "/static/drf_spectacular_sidecar/" in page.content.decode()
    assert "<script>" not in page.content.decode()
    assert "//cdn" not in page.content.decode()


@functools.cache
def generated() -> dict[str, Any]:
    """Making it takes seconds, and nothing changes it."""
    out = StringIO()
    call_command("spectacular", validate=True, fail_on_warn=True, stdout=out)
    return loaded(out.getvalue())


def loaded(text: str) -> dict[str, Any]:
    schema: dict[str, Any] = yaml.load(text, yaml.CSafeLoader)
    return schema


def test_the_committed_schema_is_what_the_code_says() -> None:
    committed = (Path(settings.BASE_DIR) / "openapi.yaml").read_text()

    assert generated() == loaded(committed), "run `make build` and commit openapi.yaml"


@pytest.mark.parametrize(
    ("accept", "read", "media_type"),
    [("*/*", loaded, "application/vnd.oai.openapi"), ("application/json", orjson.loads, "application/json")],
)
def test_the_schema_is_answered_as_it_is_committed_in_either_form(
    viewer: User, accept: str, read: Any, media_type: str
) -> None:
    answer = as_(viewer).get("/api/schema/", headers={"accept": accept})

    assert answer.headers["content-type"] == media_type
    assert read(answer.content) == loaded((Path(settings.BASE_DIR) / "openapi.yaml").read_text())


def test_the_schema_names_every_path_once_and_both_planes() -> None:
    schema = generated()

    assert schema["openapi"].startswith("3.1")
    for path in (
        "servers/{id}/test",
        "servers/{id}/models",
        "api-keys/{id}",
        "active/{purpose}",
        "health",
        "auth/token",
    ):
        assert f"/api/v1/{path}" in schema["paths"]
    assert not [path for path in schema["paths"] if "llm-config" in path or path.endswith("/")]
    assert schema["paths"]["/v1/chat/completions"]["post"]["tags"] == ["data plane"]
    assert schema["paths"]["/v1/models"]["get"]["security"] == [{"gatewayKey": []}]


def test_r08_the_schema_never_answers_a_secret() -> None:
    schemas = generated()["components"]["schemas"]

    for name in ("Server", "Provider", "ApiKey", "GatewayKey"):
        assert not {"api_key", "secret", "hmac", "key", "fingerprint"} & set(schemas[name]["properties"])
    assert "key" in schemas["Issued"]["properties"]


def test_the_documentation_has_every_path_and_method() -> None:
    text = (Path(settings.BASE_DIR) / "docs" / "api.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| `")]

    for path, methods in generated()["paths"].items():
        row = next((row for row in rows if f"`{path}`" in row or f" {path}`" in row), "")
        assert row, path
        for method in methods:
            assert method.upper() in row, (method, path)
