"""/livez, /readyz and /metrics: answered from memory by the process that is asked, whatever else is away."""

from __future__ import annotations

import hmac
import time
from collections.abc import Awaitable, Callable
from typing import Any

import orjson
from django.conf import settings
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from proxy.auth import inside
from proxy.gateway import Gateway
from proxy.metrics import registry
from proxy.watcher import Watcher

Send = Callable[[dict[str, Any]], Awaitable[None]]

BEAT_LATE_SECONDS = 30.0


async def live(gateway: Gateway, scope: dict[str, Any], send: Send) -> None:
    """The process answers. It depends on nothing and tells nothing."""
    await _answer(send, 200, b'{"status":"ok"}')


async def ready(gateway: Gateway, scope: dict[str, Any], send: Send) -> None:
    """503 when this worker must not get traffic; 200 with `degraded` while it serves without something it should have."""
    details = readiness(gateway)
    refused = gateway.registry.draining or not gateway.watcher.usable
    status = "unavailable" if refused else ("degraded" if any(v != "ok" for v in details.values()) else "ok")
    await _answer(send, 503 if refused else 200, orjson.dumps({"status": status, "details": details}))


def readiness(gateway: Gateway) -> dict[str, str]:
    """Each dependency: `ok`, or what is the matter with it in a few words."""
    watcher = gateway.watcher
    beat = watcher.weather.beat_tick
    late = settings.HEALTH_CHECK_ENABLED and (beat is None or time.time() - beat > BEAT_LATE_SECONDS)
    return {
        "server": "shutting down" if gateway.registry.draining else "ok",
        "database": _database(watcher),
        "redis": "away; limits are kept by each process" if gateway.limits.local else "ok",
        "spool": gateway.spool.problem or "ok",
        "scheduler": "late" if late else "ok",
    }


def _database(watcher: Watcher) -> str:
    if not watcher.fresh:
        return f"silent for {watcher.silence:.0f} s"
    return "read-only; changes and usage records wait" if watcher.read_only else "ok"


async def metrics(gateway: Gateway, scope: dict[str, Any], send: Send) -> None:
    """Prometheus' text format, for METRICS_ALLOWED_NETWORKS or the holder of METRICS_TOKEN; for others nothing is here."""
    if not _may_read(scope):
        await _answer(send, 404, b'{"error":{"code":"not_found","message":"There is nothing at this path."}}')
        return
    await _answer(send, 200, generate_latest(registry()), CONTENT_TYPE_LATEST.encode())


def _may_read(scope: dict[str, Any]) -> bool:
    given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    token = settings.METRICS_TOKEN
    if token and hmac.compare_digest(given, f"Bearer {token}".encode()):
        return True
    return inside((scope.get("client") or ("",))[0], settings.METRICS_ALLOWED_NETWORKS)


async def _answer(send: Send, status: int, body: bytes, kind: bytes = b"application/json") -> None:
    headers = [
        (b"content-type", kind),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
