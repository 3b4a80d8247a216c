"""What every request to the control plane's API meets: authentication, throttle, parser and pages.

The errors are in audit.api_errors, the views in audit.api_views.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from django.conf import settings
from django.core.paginator import Paginator
from django.utils.functional import cached_property
from rest_framework import exceptions
from rest_framework.authentication import get_authorization_header
from rest_framework.pagination import PageNumberPagination
from rest_framework.parsers import JSONParser
from rest_framework.permissions import BasePermission
from rest_framework.renderers import JSONRenderer
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.throttling import BaseThrottle
from rest_framework_simplejwt.authentication import JWTAuthentication
from rest_framework_simplejwt.tokens import Token

from audit.api_errors import RequestTooLarge, error_response
from audit.counters import Counters
from audit.roles import roles_of
from audit.strict_json import StrictJSONError, loads

if TYPE_CHECKING:
    # REST framework imports this module while it imports its views.
    from rest_framework.views import APIView

    Paged = Paginator[Any]
else:
    Paged = Paginator

__all__ = [
    "BearerAuthentication",
    "CallerThrottle",
    "Counted",
    "DenyAll",
    "LongPages",
    "Pages",
    "StrictJSONParser",
    "UTF8Renderer",
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
    """RATE_LIMIT_REQUESTS in RATE_LIMIT_WINDOW_SECONDS for each user, and for each address without one.

    Where RATE_LIMIT_REQUESTS_BY_ROLE names roles of a user, the largest of their limits is his.
    """

    def __init__(self) -> None:
        self._wait: float | None = None

    def allow_request(self, request: Request, view: APIView) -> bool:
        limit, by_role = settings.RATE_LIMIT_REQUESTS, settings.RATE_LIMIT_REQUESTS_BY_ROLE
        if request.user.is_authenticated:
            name = f"user:{request.user.pk}"
            if by_role:
                limit = max(
                    (by_role[role] for role in roles_of(request.user) if role in by_role), default=limit
                )
        else:
            name = f"address:{self.get_ident(request)}"
        self._wait = counters().take(name, limit=limit, window=settings.RATE_LIMIT_WINDOW_SECONDS)
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


class UTF8Renderer(JSONRenderer):
    """JSON in which half of a surrogate pair, which an older row may hold, makes all text escapes: UTF-8 cannot write it."""

    def render(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().render(*args, **kwargs)
        except UnicodeEncodeError:
            self.ensure_ascii = True  # type: ignore[misc]  # each answer has a renderer of its own
            return super().render(*args, **kwargs)


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


class Counted(Paged):
    """Counts to `EXACT` and no further: counting millions of rows takes seconds, and nobody leafs through them.

    about: asked for an estimate when there are more; without it the count is EXACT, and what lies beyond is not listed.
    """

    EXACT = 100_000
    about: Callable[[], int] | None = None
    estimated = False

    @cached_property
    def count(self) -> int:
        rows: Any = self.object_list
        found = int(rows.order_by()[: self.EXACT + 1].count())
        if found <= self.EXACT:
            return found
        self.estimated = True
        return max(found, self.about()) if self.about else self.EXACT


class LongPages(Pages):
    """Pages of what may be millions of rows: `count_estimated` says that there are too many to count.

    The view's `about_as_many()` is asked for an estimate then.
    """

    def django_paginator_class(self, rows: Any, page_size: int) -> Paged:  # type: ignore[override]  # whatever makes one
        paginator = Counted(rows, page_size)
        paginator.about = self.about_as_many
        return paginator

    def paginate_queryset(
        self, queryset: Any, request: Request, view: APIView | None = None
    ) -> list[Any] | None:
        self.about_as_many = getattr(view, "about_as_many", None)
        return super().paginate_queryset(queryset, request, view)

    def get_paginated_response(self, data: Any) -> Response:
        response = super().get_paginated_response(data)
        if self.page is not None and getattr(self.page.paginator, "estimated", False):
            response.data = {"count": response.data["count"], "count_estimated": True, **response.data}
        return response

    def get_paginated_response_schema(self, schema: Any) -> Any:
        found: Any = super().get_paginated_response_schema(schema)
        text = "There when `count` is an estimate, above 100,000."
        found["properties"]["count_estimated"] = {"type": "boolean", "description": text}
        return found
