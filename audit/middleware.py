"""Around every request of the control plane: its id, in every answer and log line, and what is said while the database is away."""

from __future__ import annotations

import logging
from collections.abc import Callable

from django.db import OperationalError
from django.http import HttpRequest, HttpResponse

from audit.api_errors import problem_of, unavailable
from audit.postgres import SERVER
from audit.request_ids import request_id_from, within

logger = logging.getLogger(__name__)


class RequestIdMiddleware:
    """Sets `request.request_id`, binds it to the logs, answers `x-request-id`, and forbids caching by default (R55)."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        request.request_id = request_id_from(request.headers.get("x-request-id"))  # type: ignore[attr-defined]
        with within(request.request_id):  # type: ignore[attr-defined]
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
