"""What the control plane tells of itself: counts of its requests, and lines of its logs, in known shapes and without secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User

from audit.api_counts import template
from config.api_operations import last_lines
from tests.support.api import V1, anybody, as_

pytestmark = pytest.mark.django_db


def test_requests_are_counted_by_endpoint_and_status(viewer: User) -> None:
    client = as_(viewer)
    before = client.get(f"{V1}/admin/stats").json()

    client.get(f"{V1}/servers")
    client.get(f"{V1}/servers/999999")
    after = client.get(f"{V1}/admin/stats").json()

    assert set(after) == {
        "uptime_seconds", "total_requests", "total_errors", "error_rate", "average_duration_ms", "status_codes", "endpoints",
        "recent_requests",
    }  # fmt: skip
    assert after["total_requests"] == before["total_requests"] + 3
    assert after["total_errors"] == before["total_errors"] + 1
    line = after["endpoints"]["GET /api/v1/servers/{id}"]
    assert set(line) == {"count", "total_duration_ms", "avg_duration_ms", "error_count"}
    assert line["error_count"] >= 1
    recent = after["recent_requests"][-2]
    assert (recent["path"], recent["status_code"]) == (f"{V1}/servers", 200)
    assert len(after["recent_requests"]) <= 10


@pytest.mark.no_database
@pytest.mark.parametrize(
    ("route", "path"),
    [
        (
            r"api/v1/^servers/(?P<pk>[0-9]{1,18})/models/(?P<model_id>(?!refresh/?$).+?)/?$",
            "/api/v1/servers/{id}/models/{model_id}",
        ),
        (r"api/v1/llm-config/^health/?$", "/api/v1/llm-config/health"),
        (r"^ping/?$", "/ping"),
        (r"^api(?:/.*)?$", "/api/*"),
    ],
)
def test_there_are_no_more_series_than_routes(route: str, path: str) -> None:
    assert template(route) == path


def write(folder: Path, name: str, *lines: Any) -> None:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / name).write_text("\n".join(texts) + "\n")


def line(second: int, message: str, **more: Any) -> dict[str, Any]:
    return {
        "timestamp": f"2026-01-31T12:00:{second:02}Z",
        "level": "info",
        "logger": "x",
        "message": message,
        **more,
    }


@pytest.mark.no_database
def test_the_last_lines_of_all_programs_come_in_order_of_time(tmp_path: Path) -> None:
    write(tmp_path, "web.log.1", line(1, "oldest"))
    write(
        tmp_path,
        "web.log",
        line(3, "third", status_code=200, path="/api/x"),
        "not JSON",
        "[1]",
        line(5, "fifth"),
    )
    write(tmp_path, "worker.log", line(2, "second"), line(4, "fourth"))

    found = last_lines(tmp_path, 4)

    assert [row["message"] for row in found] == ["second", "third", "fourth", "fifth"]
    assert [row["program"] for row in found] == ["worker", "web", "worker", "web"]
    assert found[1]["status_code"] == 200 and "path" not in found[0]
    assert last_lines(tmp_path, 9)[0]["message"] == "oldest"


@pytest.mark.no_database
def test_r53_what_looks_like_a_secret_is_not_told(tmp_path: Path) -> None:
    write(tmp_path, "web.log", line(1, "key sk-0123456789abcdefghij was sent", request_id="r"))

    assert "sk-0123" not in json.dumps(last_lines(tmp_path, 5))


def test_logs_are_for_administrators(owner: User, operator: User, settings: Any, tmp_path: Path) -> None:
    settings.LOG_DIR = tmp_path
    write(tmp_path, "web.log", *[line(second, f"line {second}") for second in range(9)])

    answer = as_(owner).get(f"{V1}/admin/logs?limit=3").json()

    assert answer["total"] == 3
    assert [row["message"] for row in answer["logs"]] == ["line 6", "line 7", "line 8"]
    assert as_(owner).get("/api/admin/logs").json()["total"] == 9
    assert as_(operator).get(f"{V1}/admin/logs").status_code == 403
    assert anybody().get(f"{V1}/admin/logs").status_code == 401
    for wrong in ("limit=0", "limit=x", "limit=5000", "colour=1"):
        assert as_(owner).get(f"{V1}/admin/logs?{wrong}").status_code == 400
    settings.LOG_DIR = tmp_path / "missing"
    assert as_(owner).get(f"{V1}/admin/logs").json() == {"logs": [], "total": 0}
