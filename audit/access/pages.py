"""The pages for getting in and out, and for one's own second factors, in the look of the admin."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from allauth.account.internal.flows.login import perform_password_login
from allauth.account.models import Login
from allauth.account.utils import get_next_redirect_url
from allauth.mfa.totp.views import ActivateTOTPView
from django.conf import settings
from django.contrib import admin
from django.core.exceptions import ValidationError
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.decorators import method_decorator
from django.views.decorators.cache import never_cache
from django.views.decorators.debug import sensitive_post_parameters
from django.views.generic.edit import FormView
from unfold.forms import AuthenticationForm

from audit.access import second_factor, signing_in
from audit.access.signing_in import Accounts
from audit.admin.door import write

View = Callable[..., HttpResponseBase]


class PasswordForm(AuthenticationForm):  # type: ignore[misc]  # unfold carries no types
    """User name and password; whoever has no business in the admin is told so only when both are right."""

    def clean(self) -> dict[str, Any]:
        username, password = self.cleaned_data.get("username"), self.cleaned_data.get("password")
        if username is None or not password:
            return dict(self.cleaned_data)
        try:
            self.user_cache = signing_in.check_password(self.request, username=username, password=password)
        except signing_in.Locked:
            raise ValidationError("Too many wrong guesses.") from None
        if self.user_cache is None:
            raise self.get_invalid_login_error()
        self.confirm_login_allowed(self.user_cache)
        return dict(self.cleaned_data)


@method_decorator([never_cache, sensitive_post_parameters("password")], name="dispatch")
class LoginPage(FormView):  # type: ignore[type-arg]  # Django's class is not generic at run time
    """The first step; allauth asks for the second one where there is one, and then makes the session."""

    form_class = PasswordForm
    template_name = "admin/access/login.html"

    def get(self, request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponse:
        if admin.site.has_permission(request):
            return HttpResponseRedirect(reverse("admin:index"))
        return super().get(request, *args, **kwargs)

    def get_form_kwargs(self) -> dict[str, Any]:
        return {**super().get_form_kwargs(), "request": self.request}

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        return {
            **admin.site.each_context(self.request),
            **super().get_context_data(**kwargs),
            "title": "Log in",
            "app_path": self.request.get_full_path(),
            "next": self.next_url,
            "single_sign_on": settings.OIDC_ISSUER,
        }

    @property
    def next_url(self) -> str:
        return get_next_redirect_url(self.request) or ""

    def form_valid(self, form: Any) -> HttpResponse:
        user = form.get_user()
        login = Login(user=user, redirect_url=self.next_url or None)
        answer: HttpResponse = perform_password_login(self.request, {"username": user.get_username()}, login)
        return answer


class EnrolPage(ActivateTOTPView):  # type: ignore[misc]  # allauth carries no types
    """An authenticator app of one's own, whose first code shows that it works."""

    def form_valid(self, form: Any) -> HttpResponse:
        answer: HttpResponse = super().form_valid(form)
        second_factor.spend_first_code(self.request.user, form.cleaned_data["code"])
        return answer


def log_out(request: HttpRequest) -> HttpResponseBase:
    """Django's page, after the end of the session was recorded."""
    if request.method == "POST" and request.user.is_authenticated:
        Accounts(request).logout(request)
    return admin.site.logout(request)


def to_login(request: HttpRequest) -> HttpResponse:
    """Where allauth sends whoever has to begin anew."""
    return HttpResponseRedirect(reverse("admin:login"))


def dressed(view: View) -> View:
    """A page of allauth with what the admin's templates need."""

    @functools.wraps(view)
    def page(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        response = view(request, *args, **kwargs)
        if isinstance(response, TemplateResponse):
            shown = dict(response.context_data or {})
            # The theme would look for this object's pages in the admin, where it has none.
            shown.pop("object", None)
            base = {**admin.site.each_context(request), "title": "Your account"}
            response.context_data = {**base, "single_sign_on": settings.OIDC_ISSUER, **shown}
        return response

    return page


def own(view: View) -> View:
    """A page of somebody who is logged in to the admin, about himself."""
    return admin.site.admin_view(dressed(view))


def own_change(view: View) -> View:
    """The same, whose POST changes his second factors: recorded, or not done."""

    @functools.wraps(view)
    def changing(request: HttpRequest, *args: Any, **kwargs: Any) -> HttpResponseBase:
        if request.method != "POST":
            return view(request, *args, **kwargs)
        return write(request, lambda: view(request, *args, **kwargs))

    return own(changing)
