"""Whether the gateway is well, for whoever asks; it tells nothing else."""

from __future__ import annotations

import time
from typing import Any

from django.conf import settings
from django.db import DatabaseError, connection
from django.utils import timezone
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.permissions import AllowAny
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from audit.api_views import OnlyJSON
from audit.postgres import SERVER

_started = time.monotonic()


class HealthSerializer(serializers.Serializer[Any]):
    status = serializers.ChoiceField(("ok", "degraded"))
    timestamp = serializers.DateTimeField()
    version = serializers.CharField()
    uptime_seconds = serializers.FloatField()


class OpenView(APIView):
    """Without login, without cookies and outside the throttle."""

    authentication_classes: list[Any] = []
    permission_classes = [AllowAny]
    throttle_classes: list[Any] = []
    content_negotiation_class = OnlyJSON


class HealthView(OpenView):
    @extend_schema(responses=HealthSerializer, tags=["health"], auth=[])
    def get(self, request: Request) -> Response:
        """`degraded` while the database cannot be reached."""
        health = {
            "status": "ok" if database_answers() else "degraded",
            "timestamp": timezone.now(),
            "version": settings.VERSION,
            "uptime_seconds": uptime(),
        }
        return Response(HealthSerializer(health).data)


class PingView(OpenView):
    schema = None

    def get(self, request: Request) -> Response:
        return Response({"status": "ok"})


def uptime() -> float:
    """Seconds since this process started."""
    return round(time.monotonic() - _started, 3)


def database_answers() -> bool:
    if SERVER.away:
        return False
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
            return bool(cursor.fetchone() == (1,))
    except DatabaseError:
        return False
