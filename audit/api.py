"""What every request to the control plane's API meets: authentication, throttle, parser and pages.

The errors are in audit.api_errors, the views in audit.api_views.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from django.conf import settings
from rest_framework import exceptions
from rest_framework.authentication import get_authorization_header
from rest_framework.pagination import PageNumberPagination
from rest_framework.parsers import JSONParser
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.throttling import BaseThrottle
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.tokens import Token

from audit.api_errors import RequestTooLarge, error_response
from audit.counters import Counters
from audit.strict_json import StrictJSONError, loads

if TYPE_CHECKING:
    # REST framework imports this module while it imports its views.
    from rest_framework.views import APIView

__all__ = [
    "BearerAuthentication",
    "CallerThrottle",
    "DenyAll",
    "Pages",
    "StrictJSONParser",
    "error_response",
]


class BearerAuthentication(JWTAuthentication):
    """A token of ours, or nothing: with an Authorization header, cookies and their session do not count.

    A gateway key is no token, so it opens nothing here.
    """

    def authenticate(self, request: Request) -> tuple[Any, Token] | None:
        if not get_authorization_header(request):
            return None
        found = super().authenticate(request)
        if found is None:
            raise exceptions.AuthenticationFailed("Only bearer tokens of this API are accepted.")
        return found


class DenyAll(BasePermission):
    """The default: a view that names no permission is closed."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        return False


class CallerThrottle(BaseThrottle):
    """RATE_LIMIT_REQUESTS in RATE_LIMIT_WINDOW_SECONDS for each user, whatever his role, and for each address without one."""

    def __init__(self) -> None:
        self._wait: float | None = None

    def allow_request(self, request: Request, view: APIView) -> bool:
        if request.user.is_authenticated:
            name = f"user:{request.user.pk}"
        else:
            name = f"address:{self.get_ident(request)}"
        self._wait = counters().take(
            name, limit=settings.RATE_LIMIT_REQUESTS, window=settings.RATE_LIMIT_WINDOW_SECONDS
        )
        return self._wait is None

    def wait(self) -> float | None:
        return self._wait


@cache
def counters() -> Counters:
    """This process's; made with the first request, since a worker is forked after this module was imported."""
    return Counters(settings.REDIS_URL)


class StrictJSONParser(JSONParser):
    """JSON without leniency (see audit.strict_json), of at most DATA_UPLOAD_MAX_MEMORY_SIZE bytes."""

    def parse(self, stream: Any, media_type: str | None = None, parser_context: Any = None) -> Any:
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE
        body = stream.read(limit + 1)
        if len(body) > limit:
            raise RequestTooLarge(f"The body is above {limit} bytes.")
        try:
            return loads(body)
        except StrictJSONError as error:
            raise exceptions.ParseError(str(error)) from error


class Pages(PageNumberPagination):
    """`page` and `page_size`; {"count", "next", "previous", "results"}."""

    page_size = 50
    max_page_size = 200
    page_size_query_param = "page_size"

    def get_page_size(self, request: Request) -> int:
        text = request.query_params.get(self.page_size_query_param)
        if text is None:
            return self.page_size
        if not (
            text.isascii() and text.isdigit() and len(text) <= 3 and 1 <= int(text) <= self.max_page_size
        ):
            message = f"Write a number from 1 to {self.max_page_size}."
            raise exceptions.ValidationError({self.page_size_query_param: [message]})
        return int(text)
