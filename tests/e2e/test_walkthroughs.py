"""Two walk-throughs that people may have at hand from other systems, as commands for a shell: only the address and the login are
ours. `{id}` stands for what an earlier answer named."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.security.conftest import PASSWORD
from tests.support.answers import raw
from tests.support.gateway import Gateway
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.no_database, pytest.mark.timeout(400)]
SERVER_BOOK = """
curl http://localhost:8084/api/v1/llm-config/health

curl http://localhost:8084/api/v1/llm-config/api-keys
  -H "Cookie: session_token=$SESSION_TOKEN"

curl -X POST http://localhost:8084/api/v1/llm-config/api-keys/{key}/test
  -H "Cookie: session_token=$SESSION_TOKEN"

curl http://localhost:8084/api/v1/llm-config/servers
  -H "Cookie: session_token=$SESSION_TOKEN"

curl -X POST http://localhost:8084/api/v1/llm-config/servers
  -H "Content-Type: application/json"
  -H "Cookie: session_token=$SESSION_TOKEN"
  -d '{"name": "Local vLLM Server", "server_type": "vllm", "base_url": "http://localhost:8000", "enabled": true,
       "use_for_chat": true}'

curl -X POST http://localhost:8084/api/v1/llm-config/servers/{server}/test
  -H "Cookie: session_token=$SESSION_TOKEN"

curl http://localhost:8084/api/v1/llm-config/servers/{server}/models
  -H "Cookie: session_token=$SESSION_TOKEN"

curl -X POST http://localhost:8084/api/v1/llm-config/active
  -H "Content-Type: application/json"
  -H "Cookie: session_token=$SESSION_TOKEN"
  -d '{"purpose": "chat", "provider_type": "ai_server", "provider_id": {server}}'

curl http://localhost:8084/api/v1/llm-config/active
  -H "Cookie: session_token=$SESSION_TOKEN"
"""

PROVIDER_BOOK = """
curl http://localhost:8000/ping

curl -X POST http://localhost:8000/api/providers/test-direct -H "Content-Type: application/json"
  -d '{"base_url": "https://api.example.com/v1", "api_key": "sk-test-key", "models": ["test-model-1", "test-model-2"]}'

curl -X POST http://localhost:8000/api/providers -H "Content-Type: application/json"
  -d '{"name": "Example Provider", "base_url": "https://api.example.com/v1", "api_key": "sk-example-key",
       "models": ["example-model-1", "example-model-2"], "is_active": true}'

curl -X POST http://localhost:8000/api/providers -H "Content-Type: application/json"
  -d '{"name": "Second Provider", "base_url": "https://api.example.com/v1", "models": ["example-model-2"]}'

curl http://localhost:8000/api/providers

curl -X POST http://localhost:8000/api/providers/{first}/test

curl http://localhost:8000/api/providers/{first}

curl -X POST http://localhost:8000/api/model-routes -H "Content-Type: application/json"
  -d '{"name": "llm-auto-route", "mode": "auto", "is_active": true, "config": {}, "nodes": [
       {"api_id": {first}, "models": [], "strategy": "round-robin", "priority": 0, "metadata": {}},
       {"api_id": {second}, "models": [], "strategy": "round-robin", "priority": 0, "metadata": {}}]}'

curl -X POST http://localhost:8000/api/model-routes/{route}/select

curl http://localhost:8000/api/model-routes/{route}/state

curl -X PATCH http://localhost:8000/api/providers/{first}/health -H "Content-Type: application/json"
  -d '{"is_healthy": false}'

curl -X POST http://localhost:8000/api/model-routes/{route}/select

curl -X DELETE http://localhost:8000/api/providers/{first}

curl http://localhost:8000/api/admin/stats

curl http://localhost:8000/api/admin/logs?limit=200
"""


@dataclass
class Shell:
    """Runs one command of a book after the other. moved: addresses of the book and ours; login: a header."""

    moved: dict[str, str]
    login: str
    names: dict[str, Any] = field(default_factory=dict)

    def read(self, book: str) -> Iterator[tuple[int, Any]]:
        """Status and answer of each command, run when it is asked for."""
        for command in book.strip().split("\n\n"):
            yield self.run(command)

    def run(self, command: str) -> tuple[int, Any]:
        for name, value in self.names.items():
            command = command.replace("{" + name + "}", str(value))
        command = command.replace("Cookie: session_token=$SESSION_TOKEN", self.login)
        for theirs, ours in self.moved.items():
            command = command.replace(theirs, ours)
        words = shlex.split(command)
        if self.login not in words:
            words += ["-H", self.login]
        words += ["--silent", "--show-error", "--max-time", "30", "--write-out", "\n%{http_code}"]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        body, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(body or "null")


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    with Gateway(
        env={"OPENROUTER_API_KEY": "sk-or-0123456789abcdef", "TEST_TIMEOUT_SECONDS": "5"}
    ) as running:
        yield running


def shell(gateway: Gateway, **moved: str) -> Shell:
    gateway.manage(
        "createsuperuser",
        "--no-input",
        "--username=root",
        "--email=root@example.com",
        env={"DJANGO_SUPERUSER_PASSWORD": PASSWORD},
    )
    with gateway.client() as client:
        answer = client.post("/api/v1/auth/token", json={"username": "root", "password": PASSWORD})
    return Shell(moved, f"Authorization: Bearer {answer.json()['access']}")


def test_the_walk_through_for_servers_and_keys(gateway: Gateway, upstream: Upstream) -> None:
    upstream.on("/key", raw(b'{"data": {"label": "a key"}}'))  # how OpenRouter tells of a key
    gateway.manage("first_run")
    run = shell(gateway)
    # So that the test of the key that was made at the first start asks nobody outside.
    _, vendors = run.run(f"curl {gateway.url}/api/v1/providers?slug=openrouter")
    vendor = vendors["results"][0]["id"]
    moved, _ = run.run(
        f"curl -X PATCH {gateway.url}/api/v1/providers/{vendor} -H 'Content-Type: application/json' -d "
        + shlex.quote(
            json.dumps(
                {"base_url": f"{upstream.url}/v1", "allow_private": True, "api_key": "sk-or-0123456789abcdef"}
            )
        )
    )
    assert moved == 200
    run.moved = {"http://localhost:8084": gateway.url, "http://localhost:8000": upstream.url}
    book = run.read(SERVER_BOOK)

    assert next(book)[1]["status"] == "ok"
    status, keys = next(book)
    assert (status, [key["provider"] for key in keys["results"]]) == (200, ["openrouter"])
    run.names["key"] = keys["results"][0]["id"]
    status, tested = next(book)
    assert (status, tested["valid"]) == (200, True)
    status, servers = next(book)
    before = servers["count"]
    status, made = next(book)
    assert (status, made["server_type"], made["enabled"], made["use_for_chat"]) == (201, "vllm", True, True)
    run.names["server"] = made["id"]
    status, tested = next(book)
    assert (status, tested["status"]) == (200, "online"), tested
    status, models = next(book)
    assert (status, bool(models["models"])) == (200, True)
    status, active = next(book)
    assert (status, active["purpose"], active["provider_id"]) == (200, "chat", made["id"])
    status, everything = next(book)
    assert (everything["chat"]["provider_name"], everything["embeddings"]) == ("Local vLLM Server", None)
    assert before == 0


def test_the_walk_through_for_providers_and_routes(gateway: Gateway, upstream: Upstream) -> None:
    run = shell(gateway, **{"https://api.example.com": upstream.url, "http://localhost:8000": gateway.url})
    book = run.read(PROVIDER_BOOK)

    assert next(book) == (200, {"status": "ok"})
    status, tested = next(book)
    assert (status, tested["status"], tested["status_code"]) == (200, "online", 200)
    status, first = next(book)
    assert (status, first["is_active"], first["kind"]) == (201, True, "openai-compatible")
    assert first["models"] == ["example-model-1", "example-model-2"] and "api_key" not in first
    status, second = next(book)
    run.names |= {"first": first["id"], "second": second["id"]}
    status, listed = next(book)
    assert {"Example Provider", "Second Provider"} <= {row["name"] for row in listed["results"]}
    status, tested = next(book)
    assert tested["status"] == "online" and tested["latency_ms"] > 0
    status, seen = next(book)
    assert (seen["status"], seen["is_healthy"], seen["consecutive_failures"]) == ("online", True, 0)
    assert seen["last_tested_at"]
    status, route = next(book)
    assert status == 201, route
    run.names["route"] = route["id"]
    assert [node["api_id"] for node in route["nodes"]] == [first["id"], second["id"]]
    status, selected = next(book)
    # Turns begin at a random node, so that workers do not all begin with the same.
    assert (status, selected["model"].startswith("example-model-")) == (200, True), selected
    assert selected["provider_id"] in {first["id"], second["id"]}
    status, state = next(book)
    assert (state["route_id"], state["route_name"]) == (route["id"], "llm-auto-route")
    assert "round_robin_indices" in state["state"]
    status, health = next(book)
    assert (health["is_healthy"], health["consecutive_failures"]) == (False, 0)
    status, selected = next(book)
    assert selected["provider_id"] == second["id"], selected
    status, refused = next(book)
    assert (status, refused["error"]["code"]) == (409, "CONFLICT")
    # Requests are counted once a second, for all processes together.
    gateway.process().wait_until(lambda: counted(run).get("409") == 1, timeout=10)
    status, stats = next(book)
    assert stats["total_requests"] >= 12 and stats["status_codes"]["409"] == 1
    assert stats["endpoints"]["POST /api/v1/providers"]["count"] == 2
    assert "DELETE" in {each["method"] for each in stats["recent_requests"]}
    status, logs = next(book)
    assert (status, set(logs)) == (200, {"logs", "total", "truncated"})


def counted(run: Shell) -> dict[str, int]:
    """Answers so far, by status."""
    found: dict[str, int] = run.run("curl http://localhost:8000/api/admin/stats")[1]["status_codes"]
    return found
