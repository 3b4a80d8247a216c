"""Two real workers and the queue: counts that all share, files that all write, and an id that goes the whole way."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from tests.security.conftest import log_in
from tests.support.gateway import Gateway
from tests.support.processes import descendants
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

REQUESTS = 40
HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("observed") / "logs"


@pytest.fixture(scope="module")
def gateway(valkey: Valkey, logs: Path) -> Iterator[Gateway]:
    env = {"WEB_CONCURRENCY": "2", "LOG_DIR": str(logs), "LOG_LEVEL": "INFO", "LOG_FORMAT": "console"}
    with Gateway(redis=valkey, programs=["worker"], env=env) as running:
        yield running


@pytest.fixture(scope="module")
def root(gateway: Gateway) -> Iterator[httpx.Client]:
    with log_in(gateway) as client:
        yield client


def until(found: Callable[[], Any], gateway: Gateway) -> Any:
    deadline = time.monotonic() + 20
    while not (value := found()):
        assert time.monotonic() < deadline, gateway.logs()[-5000:]
        time.sleep(0.1)
    return value


def test_each_worker_tells_of_the_requests_of_both(gateway: Gateway, root: httpx.Client) -> None:
    assert len(descendants(gateway.process().pid)) == 2
    with Upstream() as upstream:
        key = gateway.provide(f"{upstream.url}/v1")
        for number in range(REQUESTS):
            # A connection each, so that both workers take some.
            answer = httpx.post(
                f"{gateway.url}/v1/chat/completions",
                json=HELLO,
                headers={"x-api-key": key, "x-request-id": f"mine-{number}"},
                timeout=30,
            )
            assert answer.status_code == 200
        assert {each.headers["x-request-id"] for each in upstream.ledger.asked} == {
            f"mine-{number}" for number in range(REQUESTS)
        }

    def stats() -> Any:
        # Not `root`, which keeps its connection and so its worker.
        found = httpx.get(f"{gateway.url}/api/admin/stats", headers=root.headers, timeout=30).json()
        return found["endpoints"].get("POST /v1/chat/completions", {}).get("count") == REQUESTS and found

    answers = [until(stats, gateway) for _ in range(6)]

    assert {answer["shared"] for answer in answers} == {True}
    assert {answer["endpoints"]["POST /v1/chat/completions"]["error_count"] for answer in answers} == {0}
    recent = {each["request_id"]: each for each in answers[-1]["recent_requests"]}
    assert {f"mine-{number}" for number in range(REQUESTS)} <= set(recent)
    assert "POST /api/v1/auth/token" in answers[-1]["endpoints"]


def move_the_head(root: httpx.Client, name: str) -> None:
    """One more audit entry: where the head stands as before, the task says nothing."""
    body = {"name": name, "kind": "vllm", "base_url": "http://127.0.0.1:9"}
    assert root.post("/api/v1/servers", json=body).status_code == 201


def test_a_task_and_its_lines_belong_to_the_request_that_started_it(
    gateway: Gateway, root: httpx.Client
) -> None:
    move_the_head(root, "first")
    gateway.shell(
        "import config.celery\n"
        "from audit.request_ids import within\n"
        "from audit.tasks import anchor_head\n"
        "with within('from-a-request'):\n"
        "    anchor_head.delay()\n"
    )

    def lines() -> Any:
        return root.get("/api/v1/admin/logs", params={"request_id": "from-a-request"}).json()["logs"]

    (line,) = until(lines, gateway)

    assert line["logger"] == "audit.tasks" and line["message"].startswith("audit head is ")
    assert (line["level"], line["program"]) == ("INFO", "penstock")


def test_a_task_of_nobody_has_an_id_of_its_own(gateway: Gateway, root: httpx.Client) -> None:
    move_the_head(root, "second")
    gateway.shell("import config.celery; from audit.tasks import anchor_head; anchor_head.delay()")

    def ids() -> Any:
        found = root.get("/api/v1/admin/logs", params={"limit": 1000}).json()["logs"]
        named = {each.get("request_id", "") for each in found if each["message"].startswith("audit head is ")}
        return named - {"from-a-request"}

    (id,) = until(ids, gateway)
    assert re.fullmatch(r"[0-9a-f-]{36}", id)


def test_the_file_has_json_whatever_the_terminal_shows(gateway: Gateway, logs: Path) -> None:
    lines = (logs / "penstock.log").read_bytes().splitlines()

    assert lines and all({"timestamp", "level", "message"} <= set(orjson.loads(line)) for line in lines)
    assert logs.stat().st_mode & 0o777 == 0o700
    assert (logs / "penstock.log").stat().st_mode & 0o777 == 0o600
