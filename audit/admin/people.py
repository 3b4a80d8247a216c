"""Users and roles, and everybody's own password."""

from __future__ import annotations

from typing import Any

from django import forms
from django.contrib import admin
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponseBase
from django.urls import URLPattern, path
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget

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


admin.site.unregister(User)
admin.site.unregister(Group)


@admin.register(User)
class PersonAdmin(AuditedAdmin, DjangoUserAdmin):  # type: ignore[type-arg]  # Django's class is not generic at run time
    form = PersonForm
    add_form = UserCreationForm
    add_fieldsets = DjangoUserAdmin.add_fieldsets
    change_password_form = AdminPasswordChangeForm
    list_display = ("username", "email", "roles", "is_active", "is_staff", "is_superuser", "last_login")
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
        ("Dates", {"fields": ("last_login", "date_joined")}),
    )
    readonly_fields = ("last_login", "date_joined")

    def get_queryset(self, request: HttpRequest) -> QuerySet[User]:
        return super().get_queryset(request).prefetch_related("groups")

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
        view = super().user_change_password
        if request.method != "POST":
            return view(request, id, form_url)
        return write(request, lambda: view(request, id, form_url))


@admin.register(Group)
class RoleAdmin(AuditedAdmin, DjangoGroupAdmin):
    fields = ("name", "permissions")
    list_display = ("name",)


def own_password(request: HttpRequest) -> HttpResponseBase:
    """Changing one's own password is a change of a watched row, so it goes through the door as well."""
    if request.method != "POST":
        return admin.site.password_change(request)
    return write(request, lambda: admin.site.password_change(request))


def _own_paths() -> list[URLPattern]:
    return [
        path("login/", LoginPage.as_view(), name="login"),
        path("logout/", log_out, name="logout"),
        path("password_change/", admin.site.admin_view(own_password), name="password_change"),
    ]


# The theme's site asks for paths of our own here, and tries them before its own.
admin.site.extra_urls = _own_paths  # type: ignore[attr-defined]  # unfold adds it
