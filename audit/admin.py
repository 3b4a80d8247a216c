"""The base of every admin page that changes configuration, and the pages of the audit log, users and groups."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from django import forms
from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.contrib.auth.admin import GroupAdmin as DjangoGroupAdmin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.contrib.messages import get_messages
from django.core.exceptions import ValidationError
from django.db import OperationalError
from django.db.models import Model, QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.shortcuts import render
from django.urls import URLPattern, path, reverse
from django.utils.crypto import constant_time_compare, salted_hmac
from django.utils.html import format_html, format_html_join
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.text import capfirst
from unfold.forms import AdminPasswordChangeForm, UserChangeForm, UserCreationForm
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget

from audit.changes import AuditUnavailable, Change, changes, identity_of
from audit.diff import HIDDEN, state_of
from audit.models import Entry

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
    ModelForm = forms.ModelForm[Any]
else:
    from django.forms import ModelForm
    from unfold.admin import ModelAdmin

logger = logging.getLogger(__name__)

LOOKUPS = (
    "exact",
    "in",
    "isnull",
    "gte",
    "gt",
    "lte",
    "lt",
    "year",
    "month",
    "day",
    "id__exact",
    "pk__exact",
)
"""What a listed column may be filtered by. Prefixes and patterns would read a column letter by letter (R44)."""


@contextmanager
def recorded(request: HttpRequest) -> Iterator[Change]:
    """The one door for changes, entered by the person who sent `request`."""
    with changes(
        actor=request.user,
        via="admin",
        ip=request.META.get("REMOTE_ADDR") or None,
        request_id=getattr(request, "request_id", ""),
    ) as change:
        yield change


def write(request: HttpRequest, view: Callable[[], HttpResponseBase]) -> HttpResponseBase:
    """Run a view that changes configuration: all of it recorded, or nothing done and a page with status 503 (R50)."""
    try:
        with recorded(request):
            return view()
    except (AuditUnavailable, OperationalError):
        logger.exception("a change was undone")
        list(get_messages(request))  # they tell of what did not happen
        context = {**admin.site.each_context(request), "title": "Nothing was changed"}
        response = render(request, "admin/unavailable.html", context, status=503)
        response["Retry-After"] = "5"
        return response


def row_version(row: Model) -> str:
    """What changes when the row does: its own version, else a keyed digest of its columns and memberships."""
    version = getattr(row, "version", None)
    if version is not None:
        return str(version)
    members = {
        field.name: sorted(getattr(row, field.name).values_list("pk", flat=True))
        for field in row._meta.many_to_many
    }
    text = json.dumps([state_of(row), members], sort_keys=True, default=str)
    return salted_hmac("audit.admin.row_version", text).hexdigest()


class VersionedForm(ModelForm):
    """A form that refuses to overwrite what somebody else saved after it was opened (F40)."""

    row_version = forms.CharField(required=False, widget=forms.HiddenInput)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.initial["row_version"] = row_version(self.instance)

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        opened = self.cleaned_data.get("row_version")
        if self.instance.pk and opened and not constant_time_compare(opened, row_version(self.instance)):
            raise ValidationError(overwritten(self.instance))
        return cleaned


def overwritten(row: Model) -> str:
    """Why a save is refused, with who was faster and when, as far as the log knows."""
    identity = identity_of(row)
    entry = Entry.objects.filter(entity_type=identity.entity_type, entity_id=identity.entity_id).first()
    who = f"{entry.username or entry.get_via_display()} changed" if entry else "Somebody changed"
    when = f" at {entry.timestamp:%Y-%m-%d %H:%M:%S} UTC" if entry else ""
    return (
        f"{who} this{when}, after you opened the page, so nothing was saved. "
        "Reload the page to see it as it is now, then make your change again."
    )


class AuditedAdmin(ModelAdmin):
    """A ModelAdmin whose every POST is one recorded change.

    derived: models whose rows come and go by themselves; deleting their parent needs no permission for them and does
        not list them. unrecorded_actions: actions that dial somebody, so they enter the door for changes on their own.
    object_views: (path, method) below an object's address. extra_lookups: lookups in addresses made by our own links.
    """

    form: type[ModelForm] = VersionedForm
    change_form_before_template: ClassVar = "admin/version_field.html"
    list_per_page = 50
    delete_confirmation_template = "admin/delete_one.html"
    delete_selected_confirmation_template = "admin/delete_several.html"
    derived: ClassVar[Sequence[type[Model]]] = ()
    unrecorded_actions: ClassVar[frozenset[str]] = frozenset()
    object_views: ClassVar[Sequence[tuple[str, str]]] = ()
    extra_lookups: ClassVar[frozenset[str]] = frozenset()

    def get_urls(self) -> list[URLPattern]:
        name = f"{self.opts.app_label}_{self.opts.model_name}"
        own = [
            path(
                f"<path:object_id>/{address}/",
                self.admin_site.admin_view(getattr(self, method)),
                name=f"{name}_{address}",
            )
            for address, method in self.object_views
        ]
        return own + super().get_urls()

    def changeform_view(
        self,
        request: HttpRequest,
        object_id: str | None = None,
        form_url: str = "",
        extra_context: Any = None,
    ) -> Any:
        extra = {**(extra_context or {}), "show_history": request.user.has_perm("audit.view_entry")}
        view = super().changeform_view
        if request.method != "POST":
            return view(request, object_id, form_url, extra)
        return write(request, lambda: view(request, object_id, form_url, extra))

    def delete_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> Any:
        view = super().delete_view
        if request.method != "POST":
            return view(request, object_id, extra_context)
        response = write(request, lambda: view(request, object_id, extra_context))
        if getattr(response, "context_data", {}).get("protected"):
            response.status_code = 409
        return response

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> Any:
        view = super().changelist_view
        asked = set(request.POST.getlist("action"))
        if request.method != "POST" or (asked and asked <= self.unrecorded_actions):
            return view(request, extra_context)
        return write(request, lambda: view(request, extra_context))

    def history_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        """The history of an object is what the audit log says about it."""
        row = self.get_object(request, object_id)
        if row is None:
            raise Http404
        identity = identity_of(row)
        query = urlencode(
            {"entity_type__exact": identity.entity_type, "entity_id__exact": identity.entity_id}
        )
        return HttpResponseRedirect(f"{reverse('admin:audit_entry_changelist')}?{query}")

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest | None = None) -> bool:
        """Only what is offered: a filter of the list, or a lookup that our own links make."""
        filters = self.get_list_filter(request) if request else self.list_filter
        columns = {
            item if isinstance(item, str) else item[0] for item in filters if not isinstance(item, type)
        }
        own = {
            item.parameter_name
            for item in filters
            if isinstance(item, type) and hasattr(item, "parameter_name")
        }
        if self.date_hierarchy:
            columns.add(self.date_hierarchy)
        offered = {f"{column}__{ending}" for column in columns for ending in LOOKUPS}
        return lookup in offered | own | self.extra_lookups

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        listed, counts, lacking, protected = super().get_deleted_objects(objs, request)
        names = {str(model._meta.verbose_name) for model in self.derived}
        return (
            pruned(listed, tuple(f"{capfirst(name)}: " for name in names)),
            counts,
            lacking - names,
            protected,
        )

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change and hasattr(obj, "created_by"):
            obj.created_by = request.user.get_username()
        super().save_model(request, obj, form, change)

    # Django's own log of admin actions would be a second, weaker truth beside the audit log.
    def log_addition(self, request: HttpRequest, obj: Any, message: Any) -> Any:
        return None

    def log_change(self, request: HttpRequest, obj: Any, message: Any) -> Any:
        return None

    def log_deletions(self, request: HttpRequest, queryset: Any) -> Any:
        return None


def pruned(listed: list[Any], starts: tuple[str, ...]) -> list[Any]:
    """The nested list of what will be deleted, without lines that begin with one of `starts` and their children."""
    if not starts:
        return listed
    kept: list[Any] = []
    dropped = False
    for item in listed:
        if isinstance(item, list):
            if not dropped:
                kept.append(pruned(item, starts))
            continue
        dropped = str(item).startswith(starts)
        if not dropped:
            kept.append(item)
    return [item for item in kept if item != []]


class ReadOnlyAdmin(AuditedAdmin):
    """Rows that the program writes and people only look at."""

    actions = None
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def history_view(self, request: HttpRequest, object_id: str, extra_context: Any = None) -> HttpResponse:
        raise IncorrectLookupParameters


@admin.register(Entry)
class EntryAdmin(ReadOnlyAdmin):
    list_display = ("seq", "when", "who", "what", "entity_name", "summary", "via", "address")
    list_display_links = ("seq", "when")
    list_filter = ("timestamp", "action", "entity_type", "via")
    search_fields = ("username", "entity_name", "action", "=request_id")
    search_help_text = "Search by user, name, action or request id"
    date_hierarchy = "timestamp"
    extra_lookups = frozenset({"entity_id__exact", "user_id__exact"})
    fieldsets = (
        (None, {"fields": ("seq", "when", "who", "what", "entity", "changes_table")}),
        ("Where it came from", {"fields": ("via", "address", "request_id", "hash")}),
    )

    @admin.display(description="When (UTC)", ordering="timestamp")
    def when(self, entry: Entry) -> str:
        return f"{entry.timestamp:%Y-%m-%d %H:%M:%S}"

    @admin.display(description="Who", ordering="username")
    def who(self, entry: Entry) -> str:
        return entry.username or f"({entry.get_via_display().lower()})"

    @admin.display(description="What", ordering="action")
    def what(self, entry: Entry) -> str:
        return entry.action.replace("_", " ")

    @admin.display(description="Changed fields")
    def summary(self, entry: Entry) -> str:
        """Names of fields; of what is new or gone, all fields changed, which tells nothing."""
        names = [] if entry.action.startswith(("add_", "delete_")) else list(entry.changes)
        return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")

    @admin.display(description="IP address")
    def address(self, entry: Entry) -> str:
        return entry.ip or "-"

    @admin.display(description="About")
    def entity(self, entry: Entry) -> str:
        return f"{entry.entity_type.replace('_', ' ')} {entry.entity_id}: {entry.entity_name}"

    @admin.display(description="Changes")
    def changes_table(self, entry: Entry) -> SafeString:
        """What changed, as a table of field, before and after."""
        rows = format_html_join(
            "",
            '<tr><th scope="row">{}</th><td>{}</td><td>{}</td></tr>',
            (
                (name, shown(before), shown(after))
                for name, (before, after) in entry.changes.items()
                if shown(before) != shown(after) or before == HIDDEN
            ),
        )
        return format_html(
            '<div class="ps-scroll"><table class="ps-table"><thead><tr><th>Field</th><th>Before</th><th>After</th></tr>'
            "</thead><tbody>{}</tbody></table></div>",
            rows,
        )


def shown(value: Any) -> str:
    """A value of the log as people read it."""
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


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
class RoleAdmin(AuditedAdmin, DjangoGroupAdmin):  # type: ignore[type-arg]  # as above
    fields = ("name", "permissions")
    list_display = ("name",)


def own_password(request: HttpRequest) -> HttpResponseBase:
    """Changing one's own password is a change of a watched row, so it goes through the door as well."""
    if request.method != "POST":
        return admin.site.password_change(request)
    return write(request, lambda: admin.site.password_change(request))


def _own_paths() -> list[URLPattern]:
    return [path("password_change/", admin.site.admin_view(own_password), name="password_change")]


# The theme's site asks for paths of our own here, and tries them before its own.
admin.site.extra_urls = _own_paths
