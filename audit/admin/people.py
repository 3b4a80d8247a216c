"""Users and roles, and everybody's own password."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from allauth.account.internal.flows.reauthentication import (
    is_reauthentication_required,
    raise_if_reauthentication_required,
)
from allauth.account.models import EmailAddress
from allauth.mfa.models import Authenticator
from allauth.socialaccount.models import SocialAccount, SocialApp, SocialToken
from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.contrib.messages import get_messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget

from audit import roles
from audit.access import second_factor, signing_in
from audit.access.pages import LoginPage, log_out
from audit.admin.base import AuditedAdmin
from audit.admin.door import write
from audit.admin.versions import VersionedForm


class PersonForm(VersionedForm, UserChangeForm):  # type: ignore[misc]  # unfold carries no types
    """Roles are few, so they are ticked."""

    groups = forms.ModelMultipleChoiceField(
        Group.objects.order_by("name"),
        required=False,
        label="Roles",
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
    )


# What packages register by themselves: people and roles have pages of ours below, the rest is nobody's to edit.
for model in (
    User,
    Group,
    EmailAddress,
    SocialAccount,
    SocialApp,
    SocialToken,
    Authenticator,
    OutstandingToken,
    BlacklistedToken,
):
    if admin.site.is_registered(model):
        admin.site.unregister(model)


@admin.register(User)
class PersonAdmin(AuditedAdmin, DjangoUserAdmin):  # type: ignore[type-arg]  # Django's class is not generic at run time
    form = PersonForm
    add_form = UserCreationForm
    add_fieldsets = DjangoUserAdmin.add_fieldsets
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "roles", "second_factor", "is_active", "is_superuser", "last_login")
    list_filter = ("is_active", "is_staff", "is_superuser", "groups")
    filter_horizontal = ()
    fieldsets = (
        (None, {"fields": ("username", "password", "first_name", "last_name", "email")}),
        (
            "What this person may do",
            {
                "fields": ("is_active", "is_staff", "is_superuser", "groups"),
                "description": "A viewer looks, an operator runs providers and keys, an administrator may do all; these "
                "three get staff status by themselves. A member uses the API only.",
            },
        ),
        ("How this person logs in", {"fields": ("second_factor", "signs_on", "last_login", "date_joined")}),
    )
    readonly_fields = ("last_login", "date_joined", "second_factor", "signs_on")
    derived = (EmailAddress, SocialAccount, Authenticator, OutstandingToken, BlacklistedToken)
    object_views = (("reset-second-factor", "reset_second_factor_view"),)
    change_form_outer_before_template = "admin/access/person_state.html"

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        return (
            super().get_queryset(request).prefetch_related("groups", "authenticator_set", "socialaccount_set")
        )

    @admin.display(description="Second factor")
    def second_factor(self, user: User) -> str:
        kinds = {str(row.get_type_display()) for row in user.authenticator_set.all()}  # type: ignore[attr-defined]
        return ", ".join(sorted(kinds)) or "none"

    @admin.display(description="Single sign-on")
    def signs_on(self, user: User) -> str:
        rows = user.socialaccount_set.all()  # type: ignore[attr-defined]
        return ", ".join(f"{row.uid} at {row.provider}" for row in rows) or "not linked"

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Any = None,
    ) -> Any:
        return keeping_an_administrator(
            request,
            lambda: super(PersonAdmin, self).changeform_view(request, object_id, form_url, extra_context),
        )

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> Any:
        return keeping_an_administrator(
            request, lambda: super(PersonAdmin, self).delete_view(request, object_id, extra_context)
        )

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        return keeping_an_administrator(
            request, lambda: super(PersonAdmin, self).changelist_view(request, extra_context)
        )

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        user = kwargs.get("obj")
        enrolled = user is not None and user.authenticator_set.exists()
        may_reset = enrolled and self.has_change_permission(request, user)
        return super().render_change_form(request, {**context, "may_reset": may_reset}, *args, **kwargs)

    def reset_second_factor_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """For somebody who has lost his phone: a question when asked by GET, the deed when sent by POST.

        One's own has pages of its own, and an open session alone takes nobody's: who he is, is asked again.
        """
        user = self.get_object(request, object_id)
        if not isinstance(user, User):
            raise Http404
        if user == request.user:
            return HttpResponseRedirect(reverse("mfa_index"))
        if not self.has_change_permission(request, user):
            raise PermissionDenied
        raise_if_reauthentication_required(request, app="allauth.mfa")
        if request.method == "POST":
            return write(request, lambda: self._reset(request, user))
        context = {**self.admin_site.each_context(request), "opts": self.opts, "person": user}
        context["title"] = f"Remove the second factor of {user.get_username()}?"
        return TemplateResponse(request, "admin/access/reset_second_factor.html", context)

    def _reset(self, request: HttpRequest, user: User) -> HttpResponse:
        second_factor.reset(user)
        messages.success(request, f"{user.get_username()} now logs in without a second factor.")
        return HttpResponseRedirect(reverse("admin:auth_user_change", args=[user.pk]))

    @admin.display(description="Roles")
    def roles(self, user: User) -> str:
        return ", ".join(group.name for group in user.groups.all()) or "-"

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Only a superuser makes superusers."""
        return self.readonly_fields if request.user.is_superuser else (*self.readonly_fields, "is_superuser")

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        above = isinstance(obj, User) and obj.is_superuser and not request.user.is_superuser
        return not above and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        above = isinstance(obj, User) and obj.is_superuser and not request.user.is_superuser
        return not above and super().has_delete_permission(request, obj)

    def user_change_password(self, request: HttpRequest, id: str, form_url: str = "") -> Any:
        """Somebody else's, for whom who he is was asked again; one's own is changed where the old one is asked for."""
        user = self.get_object(request, unquote(id))
        if user == request.user:
            return HttpResponseRedirect(reverse("admin:password_change"))
        if not self.has_change_permission(request, user):
            raise PermissionDenied
        view = super().user_change_password
        if request.method != "POST":
            raise_if_reauthentication_required(request, app="allauth.mfa")
            return view(request, id, form_url)
        if is_reauthentication_required(request, app="allauth.mfa"):
            # It is asked for by GET: allauth would keep a POST in the session until then, with the new password.
            return HttpResponseRedirect(request.get_full_path())
        return write(request, lambda: view(request, id, form_url))


@admin.register(Group)
class RoleAdmin(AuditedAdmin, DjangoGroupAdmin):
    """Teams, and a look at the roles, which are what `audit.roles` makes of them."""

    fields = ("name", "permissions")
    list_display = ("name",)

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return not is_role(obj) and super().has_change_permission(request, obj)

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return not is_role(obj) and super().has_delete_permission(request, obj)


def is_role(group: Any) -> bool:
    return isinstance(group, Group) and group.name in list(roles.Role)


def keeping_an_administrator(request: HttpRequest, view: Callable[[], HttpResponseBase]) -> HttpResponseBase:
    """A view that may change people: undone, and said so, when nobody would be left who administers."""
    if request.method != "POST":
        return view()

    def checked() -> HttpResponseBase:
        response = view()
        if not roles.somebody_administers():
            raise LastAdministrator
        return response

    try:
        return write(request, checked)
    except LastAdministrator:
        list(get_messages(request))  # they tell of what did not happen
        messages.error(request, "Nothing was changed: nobody would be left who may administer people.")
        return HttpResponseRedirect(request.get_full_path())


class LastAdministrator(Exception):
    """Without an administrator there is nobody who could make one."""


def own_password(request: HttpRequest) -> HttpResponseBase:
    """Changing one's own password is a change of a watched row, so it goes through the door as well.

    The old password is looked at before that, since the form itself would let whoever found an open session guess for ever.
    """
    if request.method != "POST":
        return admin.site.password_change(request)
    try:
        signing_in.check_password(
            request, username=request.user.get_username(), password=request.POST.get("old_password", "")
        )
    except signing_in.Locked:
        return signing_in.locked_page(request, None, None)
    return write(request, lambda: admin.site.password_change(request))


def _own_paths() -> list[URLPattern]:
    return [
        path("login/", LoginPage.as_view(), name="login"),
        path("logout/", log_out, name="logout"),
        path("password_change/", admin.site.admin_view(own_password), name="password_change"),
    ]


# The theme's site asks for paths of our own here, and tries them before its own.
admin.site.extra_urls = _own_paths  # type: ignore[attr-defined]  # unfold adds it
