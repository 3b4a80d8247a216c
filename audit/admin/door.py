"""The one door for changes, as pages of the admin enter it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from django.contrib import admin
from django.contrib.messages import get_messages
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponseBase
from django.shortcuts import render

from audit.api_errors import ip_of, problem_of, request_id_of
from audit.changes import AuditUnavailable, Change, changes

logger = logging.getLogger(__name__)


@contextmanager
def recorded(request: HttpRequest) -> Iterator[Change]:
    """The one door for changes, entered by the person who sent `request`."""
    with changes(
        actor=request.user,
        via="admin",
        ip=ip_of(request),
        request_id=request_id_of(request),
    ) as change:
        yield change


def write(request: HttpRequest, view: Callable[[], HttpResponseBase]) -> HttpResponseBase:
    """Run a view that changes configuration: all of it recorded, or nothing done and a page with status 503 (R50)."""

    def inside() -> HttpResponseBase:
        with recorded(request):
            return view()

    return guarded(request, inside)


def guarded(request: HttpRequest, view: Callable[[], HttpResponseBase]) -> HttpResponseBase:
    """Run a view that enters the door for changes by itself; the same page where nothing could be done."""
    try:
        return view()
    except (AuditUnavailable, DatabaseError) as error:
        if problem_of(error).status != 503:
            raise
        logger.exception("a change was undone")
        list(get_messages(request))  # they tell of what did not happen
        context = {**admin.site.each_context(request), "title": "Nothing was changed"}
        response = render(request, "admin/unavailable.html", context, status=503)
        response["Retry-After"] = "5"
        return response
