"""The errors of the control plane's API, all in one shape.

    {"error": {"code", "message", "details"}, "request_id"}

Every exception becomes this shape in one place, `problem_of`. Applications above this one add their own trees of errors
with `know`, so that nothing below has to import them.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from django.core import exceptions as django_errors
from django.db import IntegrityError, InterfaceError, InternalError, OperationalError, models
from django.http import Http404, HttpRequest, HttpResponse, JsonResponse
from django.template.loader import render_to_string
from django.views import defaults
from rest_framework import exceptions, status
from rest_framework.response import Response

from audit.changes import AuditUnavailable, identity_of
from audit.strict_json import StrictJSONError

logger = logging.getLogger(__name__)

CODES = {
    400: "VALIDATION_ERROR",
    401: "AUTHENTICATION_REQUIRED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    405: "METHOD_NOT_ALLOWED",
    406: "NOT_ACCEPTABLE",
    409: "CONFLICT",
    412: "PRECONDITION_FAILED",
    413: "REQUEST_TOO_LARGE",
    415: "UNSUPPORTED_MEDIA_TYPE",
    429: "THROTTLED",
    500: "INTERNAL_ERROR",
    502: "PROVIDER_ERROR",
    503: "SERVICE_UNAVAILABLE",
}
WHOLE = "non_field_errors"
RETRY_SECONDS = 5
WRONG = "Something went wrong on our side."
READ_ONLY = "25006"
"""SQLSTATE read_only_sql_transaction."""


# -- errors ------------------------------------------------------------------------------------------------------------


class Conflict(exceptions.APIException):
    """The state of things does not allow it."""

    status_code = status.HTTP_409_CONFLICT
    default_detail = "This conflicts with the present state."


class PreconditionFailed(exceptions.APIException):
    status_code = status.HTTP_412_PRECONDITION_FAILED
    default_detail = "Somebody else has changed this since you read it."


class RequestTooLarge(exceptions.APIException):
    status_code = status.HTTP_413_REQUEST_ENTITY_TOO_LARGE
    default_detail = "The body is too large."


class CodeNeeded(exceptions.AuthenticationFailed):
    """Name and password are right, and a second factor is enrolled. wrong: a code was sent, and is not good."""

    def __init__(self, *, wrong: bool) -> None:
        super().__init__(
            "This code is wrong, or was used before."
            if wrong
            else "Send the code of your second factor, too."
        )
        self.told = "OTP_INVALID" if wrong else "OTP_REQUIRED"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is told of an error. details: field -> messages for 400; what is useful for others."""

    status: int
    message: str
    details: dict[str, Any] = field(default_factory=dict)
    retry_after: int | None = None
    code: str = ""
    """Where the status does not say enough."""

    def body(self, request_id: str) -> dict[str, Any]:
        error = {
            "code": self.code or CODES.get(self.status, "INTERNAL_ERROR"),
            "message": self.message,
            "details": self.details,
        }
        return {"error": error, "request_id": request_id}


Reader = Callable[[Any], Problem]
_readers: dict[type[BaseException], Reader] = {}


def know(kind: type[BaseException], reader: Reader) -> None:
    """Tell how exceptions of `kind`, a class of an application above this one, are answered."""
    _readers[kind] = reader


def problem_of(error: BaseException) -> Problem:
    """What to tell of an exception; INTERNAL_ERROR, and nothing of it, when it is nobody's."""
    reader = next((_readers[kind] for kind in type(error).__mro__ if kind in _readers), None)
    return reader(error) if reader is not None else Problem(500, WRONG)


def _of_api(error: exceptions.APIException) -> Problem:
    detail = error.detail
    if isinstance(detail, dict) and "detail" in detail:
        detail = detail["detail"]
    message = str(detail) if isinstance(detail, str) else str(error.default_detail)
    return Problem(error.status_code, message)


def _of_code(error: CodeNeeded) -> Problem:
    return Problem(401, str(error.detail), {"otp": [str(error.detail)]}, code=error.told)


def _of_validation(error: exceptions.ValidationError) -> Problem:
    return Problem(400, "The request is not valid.", dict(_flat(error.detail)))


def _of_parsing(error: exceptions.ParseError) -> Problem:
    return Problem(400, str(error.detail), {WHOLE: [str(error.detail)]})


def _of_throttle(error: exceptions.Throttled) -> Problem:
    wait = max(1, math.ceil(getattr(error, "wait", None) or 1))
    return Problem(429, f"Too many requests; try again in {wait} seconds.", retry_after=wait)


def _of_django_validation(error: django_errors.ValidationError) -> Problem:
    found = error.message_dict if hasattr(error, "error_dict") else {WHOLE: error.messages}
    return Problem(
        400, "The request is not valid.", {WHOLE if k == "__all__" else k: v for k, v in found.items()}
    )


def _of_use(error: models.ProtectedError | models.RestrictedError) -> Problem:
    """Where it is used; rows that describe one thing together are one place."""
    rows = error.protected_objects if isinstance(error, models.ProtectedError) else error.restricted_objects
    places = {(i.entity_type, i.entity_id): i.entity_name for i in map(identity_of, rows)}
    used_by = [{"type": kind, "id": key, "name": name} for (kind, key), name in sorted(places.items())]
    names = ", ".join(f"{place['type']} {place['name']}" for place in used_by)
    return Problem(409, f"This is in use by {names}.", {"used_by": used_by})


def _busy(message: str) -> Reader:
    return lambda error: Problem(503, message, retry_after=RETRY_SECONDS)


def _of_database(error: InternalError) -> Problem:
    """A standby refuses writes with an error that psycopg counts among the internal ones (F24)."""
    if getattr(error.__cause__, "sqlstate", None) == READ_ONLY:
        return Problem(
            503, "The database takes no changes now, so nothing was changed.", retry_after=RETRY_SECONDS
        )
    return Problem(500, WRONG)


def _said(status_code: int, message: str) -> Reader:
    return lambda error: Problem(status_code, message)


def _flat(detail: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """{"fallbacks": [{}, {"model": [...]}]} as {"fallbacks.1.model": [...]}: always field -> messages."""
    if isinstance(detail, dict):
        for name, inner in detail.items():
            yield from _flat(inner, f"{prefix}.{name}" if prefix else str(name))
    elif isinstance(detail, list) and any(isinstance(item, dict | list) for item in detail):
        for index, inner in enumerate(detail):
            yield from _flat(inner, f"{prefix}.{index}" if prefix else str(index))
    elif detail:
        yield prefix or WHOLE, [str(item) for item in (detail if isinstance(detail, list) else [detail])]


_readers.update(
    {
        exceptions.APIException: _of_api,
        CodeNeeded: _of_code,
        exceptions.ValidationError: _of_validation,
        exceptions.ParseError: _of_parsing,
        exceptions.Throttled: _of_throttle,
        StrictJSONError: lambda error: Problem(400, str(error), {WHOLE: [str(error)]}),
        Http404: _said(404, "There is no such thing."),
        django_errors.PermissionDenied: _said(403, "You may not do this."),
        django_errors.ValidationError: _of_django_validation,
        django_errors.RequestDataTooBig: _said(413, "The body is too large."),
        django_errors.SuspiciousOperation: _said(400, "The request is not valid."),
        models.ProtectedError: _of_use,
        models.RestrictedError: _of_use,
        IntegrityError: _said(409, "This conflicts with what is stored, which may have changed just now."),
        OperationalError: _busy("The database cannot be reached."),
        InterfaceError: _busy("The database cannot be reached."),
        InternalError: _of_database,
        AuditUnavailable: _busy("The change could not be recorded, so nothing was changed."),
    }
)


def unavailable(request: HttpRequest, problem: Problem) -> HttpResponse:
    """The answer to a request that cannot be served now: the API's shape for the API, a page for people."""
    if is_for_api(request):
        response: HttpResponse = JsonResponse(problem.body(request_id_of(request)), status=problem.status)
    else:
        # The template needs nothing from the database, unlike every page of the admin.
        response = HttpResponse(render_to_string("503.html", {"problem": problem}), status=problem.status)
    response["Retry-After"] = str(problem.retry_after or RETRY_SECONDS)
    return response


def error_response(error: Exception, context: dict[str, Any]) -> Response:
    """REST framework's exception handler: every exception, in the one shape."""
    problem = problem_of(error)
    if problem.status == 500:
        logger.error("unexpected_error", exc_info=error)
    elif problem.status == 503:
        logger.warning("service_unavailable: %s", type(error).__name__)
    response = Response(problem.body(request_id_of(context.get("request"))), status=problem.status)
    if problem.retry_after is not None:
        response["Retry-After"] = str(problem.retry_after)
    if auth_header := getattr(error, "auth_header", None):
        response["WWW-Authenticate"] = auth_header
    return response


def request_id_of(request: Any) -> str:
    return str(getattr(request, "request_id", ""))


def ip_of(request: Any) -> str | None:
    """The caller's address as the server tells it; forwarded headers are its business (TRUSTED_PROXIES)."""
    return request.META.get("REMOTE_ADDR") or None


def is_for_api(request: HttpRequest) -> bool:
    return request.path.startswith("/api/") or request.path.rstrip("/") in {"/api", "/ping"}


def _page(status_code: int, message: str, page: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
    """Django's own handler of a status, except that the API's paths get the API's shape."""

    def handler(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if is_for_api(request):
            body = Problem(status_code, message).body(request_id_of(request))
            return JsonResponse(body, status=status_code)
        return page(request, *args, **kwargs)

    return handler


bad_request = _page(400, "The request is not valid.", defaults.bad_request)
permission_denied = _page(403, "You may not do this.", defaults.permission_denied)
not_found = _page(404, "There is no such thing.", defaults.page_not_found)
_wrong = _page(500, WRONG, defaults.server_error)


def server_error(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
    """What no view caught. Middleware asks the database too, and may be the one who finds it away."""
    error = sys.exc_info()[1]
    if error is not None and (problem := problem_of(error)).status == 503:
        return unavailable(request, problem)
    return _wrong(request, *args, **kwargs)
