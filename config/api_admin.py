"""What the gateway did lately: requests by path, and lines of the log (in the shapes of the seed systems)."""

from __future__ import annotations

import time
from typing import Any

from django.conf import settings
from drf_spectacular.helpers import forced_singular_serializer
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_views import Door, KnownFields
from audit.request_ids import WELL_FORMED
from config import log_files
from config.api_health import uptime
from config.logs import redact
from proxy.api.usage import MomentField
from proxy.gateway import GATEWAY
from proxy.traffic import Counts, Row, per_status


def _one(serializer: type[serializers.Serializer[Any]]) -> Any:
    """For the schema: one object, although the action is called a list."""
    return forced_singular_serializer(serializer)  # type: ignore[no-untyped-call]  # it has no types


class EndpointSerializer(serializers.Serializer[Any]):
    count = serializers.IntegerField()
    error_count = serializers.IntegerField(help_text="Of them, answers of 400 and above.")
    total_duration_ms = serializers.FloatField()
    avg_duration_ms = serializers.FloatField()
    p50_ms = serializers.FloatField(help_text="From buckets, so roughly.")
    p95_ms = serializers.FloatField()
    max_ms = serializers.FloatField()


class RecentRequestSerializer(serializers.Serializer[Any]):
    timestamp = serializers.FloatField(help_text="Seconds since 1970.")
    method = serializers.CharField()
    path = serializers.CharField(help_text="The pattern that the path matched; no ids, no query.")
    status_code = serializers.IntegerField(
        help_text="499: the caller left first. A broken stream has its error's."
    )
    duration_ms = serializers.FloatField()
    request_id = serializers.CharField()
    user = serializers.CharField(help_text="Empty when nobody was known, or it was a gateway key.")
    gateway_key = serializers.CharField(help_text="Its name.")


class StatsSerializer(serializers.Serializer[Any]):
    uptime_seconds = serializers.FloatField(help_text="Of the process that answers.")
    since = serializers.FloatField(help_text="From when on requests are counted, in seconds since 1970.")
    shared = serializers.BooleanField(
        help_text="Whether all processes are counted, since yesterday at the earliest; else the one that answers, for want of Redis."
    )
    total_requests = serializers.IntegerField()
    total_errors = serializers.IntegerField()
    error_rate = serializers.FloatField(help_text="Per cent.")
    average_duration_ms = serializers.FloatField()
    status_codes = serializers.DictField(child=serializers.IntegerField())
    endpoints = serializers.DictField(child=EndpointSerializer(), help_text="By method and pattern.")
    recent_requests = RecentRequestSerializer(
        many=True, help_text="The newest 100 at the most, the newest first."
    )


class Stats(Door):
    """Requests of both planes, counted by path."""

    resource = "stats"
    serializer_class = StatsSerializer
    pagination_class = None
    filter_backends = ()

    @extend_schema(responses=_one(StatsSerializer))
    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return Response(stats(*GATEWAY.traffic.read()))


def stats(counts: Counts, shared: bool) -> dict[str, Any]:
    """The answer of `admin/stats`, and what the admin's page shows."""
    total = counts.total()
    return {
        "uptime_seconds": uptime(),
        "since": round(min(counts.since, time.time()), 3),
        "shared": shared,
        "total_requests": total.count,
        "total_errors": total.errors,
        "error_rate": round(100 * total.errors / total.count, 2) if total.count else 0.0,
        "average_duration_ms": _average(total),
        "status_codes": per_status(counts.statuses),
        "endpoints": {label: _endpoint(counts.rows[label]) for label in sorted(counts.rows)},
        "recent_requests": redact([*counts.recent]),
    }


def _endpoint(row: Row) -> dict[str, float]:
    return {
        "count": row.count,
        "error_count": row.errors,
        "total_duration_ms": round(row.micros / 1000, 1),
        "avg_duration_ms": _average(row),
        "p50_ms": round(row.quantile_ms(0.5), 1),
        "p95_ms": round(row.quantile_ms(0.95), 1),
        "max_ms": round(row.most_micros / 1000, 1),
    }


def _average(row: Row) -> float:
    return round(row.micros / row.count / 1000, 1) if row.count else 0.0


class LogsQuery(KnownFields):
    level = serializers.ChoiceField(
        [(name, name) for name in log_files.LEVELS], required=False, help_text="This and what is graver."
    )
    request_id = serializers.RegexField(rf"\A{WELL_FORMED.pattern}\Z", required=False, trim_whitespace=False)
    since = MomentField(required=False, help_text="A date, or a time (UTC where it has no offset).")
    limit = serializers.IntegerField(default=50, min_value=1, max_value=1000)


class LogsSerializer(serializers.Serializer[Any]):
    logs = serializers.ListField(
        child=serializers.DictField(),
        help_text="timestamp, level, logger, message, program, and what else a line says.",
    )
    total = serializers.IntegerField(help_text="How many lines this answer has.")
    truncated = serializers.BooleanField(
        help_text="Whether there may be more that was not looked for: 16 MiB of files, 4 MiB of answer."
    )


class Logs(Door):
    """The newest lines of the log files in LOG_DIR, the newest first."""

    resource = "logs"
    serializer_class = LogsSerializer
    pagination_class = None
    filter_backends = ()

    @extend_schema(parameters=[LogsQuery], responses=_one(LogsSerializer))
    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        query = LogsQuery(data=request.query_params.dict())
        query.is_valid(raise_exception=True)
        found = log_files.newest(settings.LOG_DIR, log_files.Wanted(**query.validated_data))
        return Response({"logs": found.lines, "total": len(found.lines), "truncated": found.truncated})
