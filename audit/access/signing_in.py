"""Signing in: a password, then what else is enrolled; too many wrong guesses lock the name and the address for a while (R18).

Guesses are counted by axes, in the database, so all processes count together; a wrong code of a second factor is a guess, too.
"""

from __future__ import annotations

import logging
from typing import Any

from allauth.account.adapter import DefaultAccountAdapter
from allauth.account.internal.flows.login import get_authentication_records
from allauth.account.internal.stagekit import clear_login
from allauth.core import context
from allauth.core.exceptions import ImmediateHttpResponse
from axes.handlers.proxy import AxesProxyHandler
from axes.helpers import get_cool_off, get_credentials
from django.conf import settings
from django.contrib.auth import authenticate, get_user_model
from django.contrib.auth.signals import user_login_failed
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.utils.crypto import salted_hmac

from audit.access import sessions
from audit.access.records import note, recorded

logger = logging.getLogger(__name__)

BACKEND = "django.contrib.auth.backends.ModelBackend"
BEGUN_WITH = "login_begun_with"
"""In the session of a login that is not done: Django's hash of the password that its user had at the first step."""


class Locked(Exception):
    """Too many wrong guesses, by this name or from this address."""


def check_password(request: Any, *, username: str, password: str) -> Any:
    """The user, or None when name or password is wrong. Raises Locked; a wrong guess is counted and recorded."""
    user = authenticate(request=request, username=username, password=password)
    if user is None:
        _record_failure(request, username)
        if is_locked(request):
            raise Locked
    return user


def refuse_locked(request: Any, username: str) -> None:
    """Raises Locked while guesses are not even looked at."""
    if not AxesProxyHandler.is_allowed(request, get_credentials(username)):
        request.axes_locked_out = True
        raise Locked


def count_failure(request: Any, user: Any, *, what: str) -> None:
    """A wrong second factor counts like a wrong password. Raises Locked when it was the last one that was allowed."""
    name = user.get_username()
    user_login_failed.send(sender=__name__, credentials=get_credentials(name), request=request)
    _record_failure(request, name, what=what)
    if is_locked(request):
        raise Locked


def counted_name(request: Any, credentials: Any = None) -> str:
    """What axes keeps for a user name: guesses at one name are counted, but people type their password into the wrong field."""
    name = str((credentials or request.POST).get("username") or "")
    return salted_hmac("counted name", name, algorithm="sha256").hexdigest()


def is_locked(request: Any) -> bool:
    return bool(getattr(request, "axes_locked_out", False))


def lock_seconds(request: Any) -> int:
    cool_off = get_cool_off(request)
    return int(cool_off.total_seconds()) if cool_off else 0


def _record_failure(request: Any, username: str, *, what: str = "password") -> None:
    """One entry for each guess that was counted, and none for those during the lock.

    A name that nobody has is not kept: people type their password into the wrong field.
    """
    failures = getattr(request, "axes_failures_since_start", None)
    if failures is None:
        return
    user = get_user_model().objects.filter(username=username).first() if "\0" not in username else None
    action = "lock_login" if is_locked(request) else "fail_login"
    with recorded(request):
        note(user, action, {"wrong": [None, what], "failures": [failures - 1, failures]})


def locked_page(request: HttpRequest, response: Any, credentials: Any) -> HttpResponse:
    """What axes answers in the admin instead of a form."""
    wait = lock_seconds(request)
    page = render(request, "admin/access/locked.html", {"minutes": -(-wait // 60)}, status=429)
    page["Retry-After"] = str(wait)
    return page


class Accounts(DefaultAccountAdapter):  # type: ignore[misc]  # allauth carries no types
    """The steps of a login as allauth takes them, with our record of it."""

    def is_open_for_signup(self, request: Any) -> bool:
        """Administrators make users; single sign-on has a rule of its own."""
        return False

    def pre_login(self, request: Any, user: Any, **kwargs: Any) -> Any:
        request.session[BEGUN_WITH] = user.get_session_auth_hash()
        return super().pre_login(request, user, **kwargs)

    def login(self, request: Any, user: Any) -> None:
        """Everything asked for was given: a session with a new key, recorded, or none at all.

        A new password ends what was begun with the one before, as it ends sessions.
        """
        if request.session.pop(BEGUN_WITH, None) != user.get_session_auth_hash():
            clear_login(request)
            raise ImmediateHttpResponse(refused(request, "The password was changed meanwhile. Log in again."))
        methods = [
            str(record.get("type") or record.get("method"))
            for record in get_authentication_records(request, user)
        ]
        user.backend = BACKEND
        with recorded(request, actor=user):
            super().login(request, user)
            note(user, "start_session", {"by": [None, ", ".join(dict.fromkeys(methods))]})
        sessions.begin(request.session)

    def logout(self, request: Any) -> None:
        user = request.user
        if not user.is_authenticated:
            super().logout(request)
            return
        with recorded(request, actor=user):
            note(user, "end_session")
            super().logout(request)

    def get_login_redirect_url(self, request: Any) -> str:
        """A member has no business in the admin; what he may use is described here."""
        return str(settings.LOGIN_REDIRECT_URL) if request.user.is_staff else "/api/docs/"

    def get_signup_redirect_url(self, request: Any) -> str:
        """Whoever came with single sign-on for the first time goes where he will go the next time."""
        return self.get_login_redirect_url(request)

    def reauthenticate(self, user: Any, password: str) -> bool:
        """Before something that needs care: the password again, and wrong ones count."""
        request = context.request
        try:
            found = check_password(request, username=user.get_username(), password=password)
        except Locked:
            return False
        return found is not None and found.pk == user.pk

    def respond_user_inactive(self, request: Any, user: Any) -> HttpResponse:
        return refused(request, "This account is switched off. An administrator can switch it on again.")

    def send_notification_mail(self, *args: Any, **kwargs: Any) -> None:
        """The gateway sends no mail; the audit log tells."""


def refused(request: Any, why: str, status: int = 403) -> HttpResponse:
    """A page for somebody who is not let in."""
    return render(request, "admin/access/refused.html", {"why": why}, status=status)
