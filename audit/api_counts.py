"""How many requests the control plane's API got, how long they took and how they ended."""

from __future__ import annotations

import functools
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from django.http import HttpRequest, HttpResponse
from prometheus_client import REGISTRY, CollectorRegistry, Summary, multiprocess

from audit.api_errors import is_for_api

logger = logging.getLogger(__name__)

REQUESTS = Summary(
    "penstock_api_request_seconds",
    "Requests to the control plane's API, by how they ended.",
    ["method", "path", "status"],
)
METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
RECENT: deque[dict[str, Any]] = deque(maxlen=10)
"""The last requests to this process."""
QUIET = ("/health", "/ping")
"""Asked all the time, and not worth a line each."""
GROUP = re.compile(r"\(\?P<(\w+)>(?:[^()]|\([^()]*\))*\)")


class CountingMiddleware:
    """Counts a request when it is answered, and writes a line about it."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        began = time.monotonic()
        response = self.get_response(request)
        if is_for_api(request):
            count(request, response.status_code, time.monotonic() - began)
        return response


def count(request: HttpRequest, status: int, seconds: float) -> None:
    """Count one answered request."""
    method = request.method if request.method in METHODS else "OTHER"
    route = getattr(request.resolver_match, "route", "")
    REQUESTS.labels(method, template(route), str(status)).observe(seconds)
    seen = {
        "method": method,
        "path": request.path[:200],
        "status_code": status,
        "duration_ms": round(seconds * 1000, 1),
    }
    RECENT.append({"timestamp": time.time(), **seen})
    if not request.path.rstrip("/").endswith(QUIET):
        logger.info("request_completed", extra=seen)


@functools.lru_cache(maxsize=1024)
def template(route: str) -> str:
    """A route as people write it, so that there are no more series than routes: `/api/v1/servers/{id}`."""
    text = GROUP.sub(r"{\1}", route).replace("^", "").replace("\\", "").removesuffix("$").removesuffix("/?")
    return "/" + text.replace("(?:/.*)?", "/*").replace("(?:v1/)?", "").replace("{pk}", "{id}").lstrip("/")


def registry() -> CollectorRegistry:
    """What all processes of this server counted, where they share it; else what this one did."""
    if not os.environ.get("PROMETHEUS_MULTIPROC_DIR"):
        return REGISTRY
    shared = CollectorRegistry()
    multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]
    return shared


def counted() -> Iterator[tuple[str, str, int, float]]:
    """(endpoint, status, requests, seconds) for each endpoint and status so far."""
    found: dict[tuple[str, str], dict[str, float]] = {}
    for family in registry().collect():
        if family.name != "penstock_api_request_seconds":
            continue
        for sample in family.samples:
            what = sample.name.rpartition("_")[2]
            key = (f"{sample.labels['method']} {sample.labels['path']}", sample.labels["status"])
            found.setdefault(key, {})[what] = sample.value
    for (endpoint, status), values in found.items():
        yield endpoint, status, int(values.get("count", 0)), values.get("sum", 0.0)
