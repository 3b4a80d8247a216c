"""The request id of the control plane: the caller's if it is well-formed, else a new one; in every answer and log line."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable

import structlog
from django.http import HttpRequest, HttpResponse

WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")


def request_id_from(given: str | None) -> str:
    """The caller's id when it is 1-128 letters, digits or `._:-`, else a fresh one."""
    if given and WELL_FORMED.fullmatch(given):
        return given
    return secrets.token_hex(16)


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
