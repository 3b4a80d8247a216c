"""Around every request of the control plane: its id, in every answer and log line, and what is said while the database is away."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable

import structlog
from django.db import OperationalError
from django.http import HttpRequest, HttpResponse

from audit.api_errors import problem_of, unavailable
from audit.postgres import SERVER

logger = logging.getLogger(__name__)

WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_from(given: str | None) -> str:
    """The caller's id when it is 1-128 letters, digits or `._:-`, else a fresh one; also for a key in its place, for ids are kept."""
    if given and WELL_FORMED.fullmatch(given) and not given.startswith("pen_"):
        return given
    return f"{random.getrandbits(128):032x}"  # It opens nothing, and the kernel is slow to ask.


class RequestIdMiddleware:
    """Sets `request.request_id`, binds it to the logs, answers `x-request-id`, and forbids caching by default (R55)."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.request_id = request_id_from(request.headers.get("x-request-id"))  # type: ignore[attr-defined]
        with structlog.contextvars.bound_contextvars(request_id=request.request_id):  # type: ignore[attr-defined]
            response = self.get_response(request)
        response["x-request-id"] = request.request_id  # type: ignore[attr-defined]
        if not response.has_header("Cache-Control"):
            response["Cache-Control"] = "no-store"
        return response


class DatabaseAwayMiddleware:
    """Answers 503 with a page or the API's shape, and no traceback, when a view cannot reach the database (F22).

    While it is known to be away nobody waits to find out for himself; only the health view tells it in its own way.
    """

    OPEN = ("/health", "/ping")

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        if SERVER.away and not request.path.rstrip("/").endswith(self.OPEN):
            return unavailable(request, problem_of(OperationalError()))
        return self.get_response(request)

    def process_exception(self, request: HttpRequest, error: Exception) -> HttpResponse | None:
        problem = problem_of(error)
        if problem.status != 503:
            return None
        logger.warning("service_unavailable: %s", type(error).__name__)
        return unavailable(request, problem)
