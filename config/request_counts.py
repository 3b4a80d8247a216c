"""Counts the control plane's requests by the pattern of their path, beside those that the data plane counts itself."""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable
from typing import Any

from django.http import HttpRequest, HttpResponse
from django.utils.functional import empty

from proxy.gateway import GATEWAY
from proxy.traffic import OTHER

NAMED_GROUP = re.compile(r"\(\?P<(\w+)>(?:[^()]|\([^()]*\))*\)")
CONVERTER = re.compile(r"<(?:\w+:)?(\w+)>")
MOUNT = re.compile(r"^/api/(?:v1/(?:llm-config/)?)?")


class RequestCounts:
    """Notes every answer of Django's. Files and what is refused before Django sees it have no pattern, or are not counted."""

    def __init__(self, get_response: Callable[[HttpRequest], HttpResponse]) -> None:
        self.get_response = get_response

    def __call__(self, request: HttpRequest) -> HttpResponse:
        began = time.monotonic()
        response = self.get_response(request)
        match = request.resolver_match
        route = pattern_of(match.route) if match is not None else OTHER
        request_id = getattr(request, "request_id", "")
        GATEWAY.traffic.note(
            route, request.method or "", response.status_code, began, request_id, user=_name_of(request)
        )
        return response


@functools.lru_cache(maxsize=1024)
def pattern_of(route: str) -> str:
    """`/api/v1/servers/{id}` for Django's `api/v1/^servers/(?P<pk>[^/.]+)/?$`. All mounts of the API count as one."""
    text = CONVERTER.sub(r"{\1}", NAMED_GROUP.sub(r"{\1}", route))
    text = re.sub(r"/\?$", "", re.sub(r"[\^$]", "", text)).replace("\\", "").replace("{pk}", "{id}")
    if "(" in text:
        return OTHER
    return MOUNT.sub("/api/v1/", f"/{text}".rstrip("/") or "/")


def _name_of(request: HttpRequest) -> str:
    """Who is known to have asked; nobody is looked up for it."""
    user: Any = getattr(request, "user", None)
    if user is None or getattr(user, "_wrapped", user) is empty or not user.is_authenticated:
        return ""
    return str(user.get_username())
