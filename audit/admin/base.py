"""The base of every admin page: what it changes is recorded, what it hides stays hidden."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from django.apps import apps
from django.contrib import admin
from django.contrib.admin.options import IncorrectLookupParameters
from django.db import DataError
from django.db.models import Model
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.safestring import SafeString
from django.utils.text import capfirst

from audit.admin.door import write
from audit.admin.versions import ModelForm, VersionedForm
from audit.changes import identity_of
from audit.roles import WRITTEN_BY_NOBODY

if TYPE_CHECKING:
    ModelAdmin = admin.ModelAdmin[Any]
else:
    from unfold.admin import ModelAdmin

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


class AuditedAdmin(ModelAdmin):
    """A ModelAdmin whose every POST is one recorded change.

    derived: models whose rows come and go by themselves, beside those that the gateway alone writes; deleting their parent
        needs no permission for them and does not list them. unrecorded_actions: actions that dial somebody, so they enter the door for changes on their own.
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

    def get_list_display(self, request: HttpRequest) -> Any:
        """A column says which rows belong to a configuration file, where there are any."""
        shown = super().get_list_display(request)
        if (
            not hasattr(self.model, "managed_by")
            or not self.model._default_manager.exclude(managed_by="").exists()
        ):
            return shown
        return (*shown, "managed")

    @admin.display(description="Managed by", ordering="managed_by")
    def managed(self, row: Any) -> SafeString | str:
        return (
            format_html('<span class="ps-badge ps-info">{}</span>', row.managed_by) if row.managed_by else "-"
        )

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

    def get_changelist_instance(self, request: HttpRequest) -> Any:
        """A filter in the address that no database can answer is one that Django cannot read: the list without it."""
        try:
            return super().get_changelist_instance(request)
        except (ValueError, OverflowError, DataError) as error:
            raise IncorrectLookupParameters(str(error)) from error

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
        named = (item[0] if isinstance(item, tuple) else item for item in filters)
        columns = {item for item in named if isinstance(item, str)}
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
        models = {*self.derived, *map(apps.get_model, WRITTEN_BY_NOBODY)}
        names = {str(model._meta.verbose_name) for model in models}
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
        """What the program writes has no history of its own."""
        raise Http404
