"""`admin/stats` and `admin/logs`: what is told, what never is, and to whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from django.contrib.auth.models import User

from proxy.gateway import GATEWAY
from proxy.traffic import Traffic
from tests.support.api import V1, anybody, as_, error

pytestmark = pytest.mark.django_db
CANARY = "sk-canary-0123456789abcdef"


@pytest.fixture(autouse=True)
def _fresh_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GATEWAY, "traffic", Traffic())


@pytest.fixture
def log(tmp_path: Path, settings: Any) -> Path:
    settings.LOG_DIR = tmp_path
    return tmp_path / "penstock.log"


def line(number: int, **fields: Any) -> bytes:
    event = {
        "timestamp": f"2026-01-01T00:00:{number:02}.000000Z",
        "level": "info",
        "logger": "a",
        "message": f"line {number}",
    }
    return orjson.dumps({**event, **fields}) + b"\n"


def told(client: Any, **query: Any) -> list[str]:
    response = client.get(f"{V1}/admin/logs", query)
    assert response.status_code == 200, response.content
    assert response.json()["total"] == len(response.json()["logs"])
    return [each["message"] for each in response.json()["logs"]]


# -- stats -------------------------------------------------------------------------------------------------------------


def test_stats_count_requests_by_the_pattern_of_their_path_and_all_mounts_as_one(viewer: User) -> None:
    client = as_(viewer)
    for path in ("/api/v1/servers", "/api/servers/", "/api/v1/llm-config/servers", "/api/v1/servers/4711"):
        client.get(path)
    anybody().get("/api/v1/servers")

    stats = client.get("/api/admin/stats").json()

    servers = stats["endpoints"]["GET /api/v1/servers"]
    assert (servers["count"], servers["error_count"]) == (4, 1)
    assert stats["endpoints"]["GET /api/v1/servers/{id}"]["error_count"] == 1
    assert (stats["total_requests"], stats["total_errors"], stats["error_rate"]) == (5, 2, 40.0)
    assert stats["status_codes"] == {"200": 3, "401": 1, "404": 1}
    assert stats["shared"] is False
    assert 0 < servers["p50_ms"] <= servers["p95_ms"] <= servers["max_ms"]
    assert servers["avg_duration_ms"] == pytest.approx(servers["total_duration_ms"] / 4, abs=0.1)


def test_recent_requests_name_who_asked_and_neither_query_nor_body_nor_what_looks_like_a_secret(
    viewer: User,
) -> None:
    client = as_(viewer)
    client.get(f"/api/v1/servers?search={CANARY}", headers={"x-request-id": "mine-1"})
    client.post("/api/v1/servers", {"name": CANARY}, headers={"x-request-id": CANARY})
    anybody().post("/api/v1/auth/token", {"username": CANARY, "password": CANARY})

    response = client.get(f"{V1}/admin/stats")

    login, refused, listed = response.json()["recent_requests"]
    assert (listed["request_id"], listed["user"], listed["path"]) == ("mine-1", "viewer", "/api/v1/servers")
    assert (listed["method"], listed["status_code"], listed["gateway_key"]) == ("GET", 200, "")
    assert refused["status_code"] == 403 and login["user"] == ""
    assert CANARY not in response.content.decode()


def test_paths_and_methods_that_somebody_invents_make_no_labels(viewer: User) -> None:
    client = as_(viewer)
    for number in range(50):
        client.generic(f"BREW{number}", f"/api/nothing/{number}")
        client.get(f"/nowhere/{number}")
        client.get(f"/admin/nowhere-{number}/")
        client.get(f"/api/v1/servers/{number}")

    assert len(client.get(f"{V1}/admin/stats").json()["endpoints"]) <= 5


def test_stats_are_for_staff_and_logs_for_administrators(
    viewer: User, operator: User, stranger: User, owner: User, log: Path
) -> None:
    def statuses(path: str) -> list[int]:
        people = (as_(stranger), as_(viewer), as_(operator), as_(owner))
        return [client.get(f"{V1}/{path}").status_code for client in (anybody(), *people)]

    assert statuses("admin/stats") == [401, 403, 200, 200, 200]
    assert statuses("admin/logs") == [401, 403, 403, 403, 200]


# -- logs --------------------------------------------------------------------------------------------------------------


def test_logs_are_the_newest_lines_of_all_programs_in_the_order_of_time(owner: User, log: Path) -> None:
    log.with_name("penstock.log.1").write_bytes(line(1) + line(2))
    log.write_bytes(line(4) + line(6))
    log.with_name("worker.log").write_bytes(line(3) + line(5))
    client = as_(owner)

    assert told(client) == [f"line {number}" for number in (6, 5, 4, 3, 2, 1)]
    assert told(client, limit=2) == ["line 6", "line 5"]
    newest = client.get("/api/admin/logs", {"limit": 1}).json()["logs"][0]
    assert (newest["program"], newest["level"]) == ("penstock", "INFO")


def test_logs_are_found_by_level_request_id_and_time(owner: User, log: Path) -> None:
    log.write_bytes(
        line(1, level="error", request_id="a")
        + line(2, request_id="ab")
        + line(3, level="warning")
        + line(4, message="a speaks of request_id a", request_id="b")
    )
    client = as_(owner)

    assert told(client, level="WARNING") == ["line 3", "line 1"]
    assert told(client, request_id="a") == ["line 1"]
    assert told(client, since="2026-01-01T01:00:03+01:00") == ["a speaks of request_id a", "line 3"]
    assert told(client, since="2026-01-02") == []


@pytest.mark.parametrize(
    "query",
    [
        {"limit": "0"},
        {"limit": "1001"},
        {"limit": "many"},
        {"level": "LOUD"},
        {"since": "yesterday"},
        {"request_id": "a b"},
        {"request_id": "a\n"},
        {"path": "/etc/passwd"},
    ],
)
def test_a_bad_question_is_400_and_names_what_is_wrong(owner: User, log: Path, query: dict[str, str]) -> None:
    response = as_(owner).get(f"{V1}/admin/logs", query)

    assert response.status_code == 400
    assert [*error(response)["details"]] == [*query]


def test_what_is_in_a_file_is_redacted_once_more(owner: User, log: Path) -> None:
    log.write_bytes(
        line(1, message=f"key {CANARY}", api_key="plain", deep={"password": "plain", "list": [CANARY]})
        + f"Traceback: {CANARY}\n".encode()
    )

    response = as_(owner).get(f"{V1}/admin/logs")

    assert response.json()["total"] == 2
    assert CANARY not in response.content.decode() and "plain" not in response.content.decode()


def test_a_line_that_is_no_json_is_told_as_a_message(owner: User, log: Path) -> None:
    log.write_bytes(line(1) + b"Segmentation fault \xff\n" + line(2) + b'["a list"]\n' + b'{"unfinished": ')

    client = as_(owner)

    assert told(client) == [
        '{"unfinished": ',
        '["a list"]',
        "line 2",
        "Segmentation fault \N{REPLACEMENT CHARACTER}",
        "line 1",
    ]
    assert told(client, level="DEBUG") == ["line 2", "line 1"]


def test_without_files_there_are_no_lines(owner: User, log: Path) -> None:
    assert told(as_(owner)) == []
