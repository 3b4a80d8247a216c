"""What people make of the schema: typed clients, and requests copied from its examples."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from django.conf import settings
from django.contrib.auth.models import User

from config.examples import fits
from tests.support.api import V1, as_

SCHEMA = Path(settings.BASE_DIR) / "openapi.yaml"


def read() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load(SCHEMA.read_text(), yaml.CSafeLoader)
    return found


def operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, item in read()["paths"].items():
        for method, operation in item.items():
            yield f"{method} {path}", operation


@pytest.mark.no_database
@pytest.mark.timeout(320)
def test_a_typed_python_client_is_generated_with_every_operation_and_understands_an_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "client.yml").write_text("post_hooks: []\n")
    done = subprocess.run(
        [
            sys.executable, "-m", "openapi_python_client", "generate", "--path", str(SCHEMA), "--meta", "none",
            "--config", str(tmp_path / "client.yml"), "--output-path", str(tmp_path / "penstock_client"), "--fail-on-warning",
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    package = importlib.import_module("penstock_client")
    made = {
        path.stem for path in (tmp_path / "penstock_client" / "api").rglob("*.py") if path.stem != "__init__"
    }
    assert made == {operation["operationId"] for _, operation in operations()}

    example = read()["paths"]["/api/v1/servers/{id}"]["get"]["responses"]["200"]["content"][
        "application/json"
    ]
    answer = httpx.MockTransport(lambda request: httpx.Response(200, json=example["example"]))
    client = package.Client(base_url="http://testserver", httpx_args={"transport": answer})
    server = importlib.import_module("penstock_client.api.servers.servers_retrieve").sync(
        client=client, id=13
    )
    assert (server.name, server.is_healthy, server.last_health_check.year) == ("Box", True, 2026)


@pytest.mark.no_database
def test_every_json_body_of_every_operation_has_an_example_of_its_shape() -> None:
    schema = read()
    schemas, wrong, count = schema["components"]["schemas"], [], 0
    for name, operation in operations():
        bodies = [operation.get("requestBody", {}), *operation["responses"].values()]
        for body in bodies:
            content = body.get("content", {}).get("application/json")
            if content is None:
                continue
            count += 1
            if "example" not in content or not fits(content["example"], content["schema"], schemas):
                wrong.append(name)
    assert not wrong
    assert count > 200


@pytest.mark.no_database
def test_operations_have_names_that_differ_and_words_for_people() -> None:
    names = [operation["operationId"] for _, operation in operations()]

    assert len(names) == len(set(names))
    assert not [name for name in names if re.search(r"_\d+$", name)]
    assert all(operation["responses"] and operation["tags"] for _, operation in operations())


@pytest.mark.no_database
def test_no_shape_names_a_type_twice() -> None:
    """`["string", "null", "null"]` is no JSON Schema, and some clients refuse all of it."""

    def types(shape: Any) -> Iterator[list[str]]:
        if isinstance(shape, dict):
            if isinstance(shape.get("type"), list):
                yield shape["type"]
            shape = list(shape.values())
        for part in shape if isinstance(shape, list) else ():
            yield from types(part)

    assert [found for found in types(read()) if len(found) != len(set(found))] == []


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["servers", "providers", "gateway-keys", "model-routes"])
def test_an_example_that_is_sent_as_it_stands_works(owner: User, path: str) -> None:
    client = as_(owner)
    body = read()["paths"][f"{V1}/{path}"]["post"]["requestBody"]["content"]["application/json"]["example"]
    if path == "model-routes":
        body["nodes"] = []

    response = client.post(f"{V1}/{path}", body)

    assert response.status_code == 201, response.content
