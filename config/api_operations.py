"""What the control plane has been doing: counts of its requests, and the last lines of the logs."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import orjson
from django.conf import settings
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_counts import RECENT, counted
from audit.api_views import Door, KnownFields
from config.api_health import uptime
from config.logs import redact

MAX_LINES = 1000
TAIL_BYTES = 1024 * 1024
"""How far back each file is read."""
LINE = (
    "timestamp",
    "level",
    "logger",
    "message",
    "request_id",
    "method",
    "path",
    "status_code",
    "duration_ms",
)


class EndpointSerializer(serializers.Serializer[Any]):
    count = serializers.IntegerField()
    total_duration_ms = serializers.FloatField()
    avg_duration_ms = serializers.FloatField()
    error_count = serializers.IntegerField()


class RecentSerializer(serializers.Serializer[Any]):
    timestamp = serializers.FloatField(help_text="Seconds since 1970.")
    method = serializers.CharField()
    path = serializers.CharField()
    status_code = serializers.IntegerField()
    duration_ms = serializers.FloatField()


class StatsSerializer(serializers.Serializer[Any]):
    uptime_seconds = serializers.FloatField()
    total_requests = serializers.IntegerField(help_text="To the control plane's API, since the start.")
    total_errors = serializers.IntegerField(help_text="Answered with 4xx or 5xx.")
    error_rate = serializers.FloatField(help_text="Percent.")
    average_duration_ms = serializers.FloatField()
    status_codes = serializers.DictField(child=serializers.IntegerField())
    endpoints = serializers.DictField(child=EndpointSerializer())
    recent_requests = RecentSerializer(many=True, help_text="The last ten of the process that answers.")


class LogLineSerializer(serializers.Serializer[Any]):
    timestamp = serializers.CharField()
    level = serializers.CharField()
    logger = serializers.CharField()
    message = serializers.CharField()
    program = serializers.CharField(help_text="Whose log it is in: web, worker, beat, drainer.")
    request_id = serializers.CharField(required=False)
    method = serializers.CharField(required=False)
    path = serializers.CharField(required=False)
    status_code = serializers.IntegerField(required=False)
    duration_ms = serializers.FloatField(required=False)


class LogsSerializer(serializers.Serializer[Any]):
    logs = LogLineSerializer(many=True, help_text="The newest last.")
    total = serializers.IntegerField()


class LogsQuery(KnownFields):
    limit = serializers.IntegerField(required=False, default=50, min_value=1, max_value=MAX_LINES)


class Stats(Door):
    """Requests to this API since the start: how many, how long, how they ended. Applications' requests are in usage."""

    resource = "stats"
    words: ClassVar = {"show": "read"}
    serializer_class = StatsSerializer
    pagination_class = None
    filter_backends = ()

    @extend_schema(operation_id="admin_stats", responses=StatsSerializer)
    def show(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        endpoints: dict[str, dict[str, float]] = {}
        codes: Counter[str] = Counter()
        for name, status, requests, seconds in counted():
            line = endpoints.setdefault(name, {"count": 0, "total_duration_ms": 0.0, "error_count": 0})
            line["count"] += requests
            line["total_duration_ms"] += seconds * 1000
            line["error_count"] += requests if status >= "400" else 0
            codes[status] += requests
        for line in endpoints.values():
            line["avg_duration_ms"] = round(line["total_duration_ms"] / max(line["count"], 1), 3)
            line["total_duration_ms"] = round(line["total_duration_ms"], 3)
        total = sum(codes.values())
        errors = sum(number for status, number in codes.items() if status >= "400")
        spent = sum(line["total_duration_ms"] for line in endpoints.values())
        answer = {
            "uptime_seconds": uptime(),
            "total_requests": total,
            "total_errors": errors,
            "error_rate": round(100 * errors / max(total, 1), 2),
            "average_duration_ms": round(spent / max(total, 1), 3),
            "status_codes": dict(sorted(codes.items())),
            "endpoints": endpoints,
            "recent_requests": list(RECENT),
        }
        return Response(answer)


class Logs(Door):
    """The last lines of the log files in LOG_DIR, which `make run` writes. Containers log to their output instead."""

    resource = "logs"
    words: ClassVar = {"show": "read"}
    serializer_class = LogsSerializer
    pagination_class = None
    filter_backends = ()

    @extend_schema(
        operation_id="admin_logs",
        responses=LogsSerializer,
        parameters=[
            OpenApiParameter("limit", OpenApiTypes.INT, description=f"1 to {MAX_LINES}; 50 if left out.")
        ],
    )
    def show(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        form = LogsQuery(data=request.query_params.dict())
        form.is_valid(raise_exception=True)
        lines = last_lines(settings.LOG_DIR, form.validated_data["limit"])
        return Response({"logs": lines, "total": len(lines)})


def last_lines(folder: Path, limit: int) -> list[dict[str, Any]]:
    """The newest `limit` lines of all programs in order of time, without secrets."""
    found = [line for path in sorted(folder.glob("*.log")) for line in _lines(path, limit)]
    found.sort(key=lambda line: line["timestamp"])
    return [redact(line) for line in found[-limit:]]


def _lines(path: Path, limit: int) -> list[dict[str, Any]]:
    """The last lines of one file that are ours: JSON objects with a time. Also those of the file before it, when it is short."""
    found: list[dict[str, Any]] = []
    for file in (path, path.with_name(f"{path.name}.1")):
        found = [*_ours(file), *found]
        if len(found) >= limit:
            break
    return found[-limit:]


def _ours(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read(TAIL_BYTES).splitlines()
    except OSError:
        return
    for text in lines:
        try:
            line = orjson.loads(text)
        except orjson.JSONDecodeError:
            continue
        if isinstance(line, dict) and isinstance(line.get("timestamp"), str):
            texts = {name: str(line.get(name, "")) for name in LINE[:4]}
            more = {name: line[name] for name in LINE[4:] if line.get(name) is not None}
            yield {**texts, **more, "program": path.name.partition(".")[0]}
