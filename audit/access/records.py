"""Entries of the audit log about people getting in and out, which change no row that is watched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.contrib.auth.models import AnonymousUser

from audit.api_errors import ip_of, is_for_api, request_id_of
from audit.changes import Change, Identity, changes, current


@contextmanager
def recorded(request: Any, actor: Any = None) -> Iterator[Change]:
    """The one door for changes, entered by `actor` (default: whoever is logged in) in this request."""
    user = actor or getattr(request, "user", None)
    with changes(
        actor=None if user is None or isinstance(user, AnonymousUser) or user.pk is None else user,
        via="api" if is_for_api(request) else "admin",
        ip=ip_of(request),
        request_id=request_id_of(request),
    ) as change:
        yield change


def note(user: Any, action: str, changes: dict[str, list[Any]] | None = None) -> None:
    """One entry about `user` (None: about nobody we know) in the open block. action: verb and noun, like "start_session"."""
    verb, _, noun = action.partition("_")
    pk, name = (str(user.pk), str(user.get_username())) if user else ("", "")
    current().add(verb=verb, identity=Identity("user", pk, name, noun), changes=changes or {})
