"""The audit log; only looked at."""

from __future__ import annotations

import re
from typing import Any

from django.contrib import admin
from django.db.models.query import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from audit.admin.base import ReadOnlyAdmin
from audit.diff import HIDDEN
from audit.models import Entry
from audit.search import about_fingerprint
from audit.strict_json import readable

FINGERPRINT = re.compile(r"[0-9a-f]{24}")


@admin.register(Entry)
class EntryAdmin(ReadOnlyAdmin):
    list_display = ("seq", "when", "who", "what", "entity_name", "summary", "via", "address")
    list_display_links = ("seq", "when")
    list_filter = ("timestamp", "action", "entity_type", "via")
    search_fields = ("username", "entity_name", "action", "=request_id")
    search_help_text = "Search by user, name, action, request id, or the fingerprint of a key"
    date_hierarchy = "timestamp"
    extra_lookups = frozenset({"entity_id__exact", "user_id__exact"})
    fieldsets = (
        (None, {"fields": ("seq", "when", "who", "what", "entity", "changes_table")}),
        ("Where it came from", {"fields": ("via", "address", "request_id", "hash")}),
    )

    def get_search_results(
        self, request: HttpRequest, queryset: QuerySet[Entry], search_term: str
    ) -> tuple[QuerySet[Entry], bool]:
        """A fingerprint is looked for where keys came and went; everything else as usual."""
        if FINGERPRINT.fullmatch(search_term.strip()):
            return queryset.filter(about_fingerprint(search_term.strip())), False
        found: tuple[QuerySet[Entry], bool] = super().get_search_results(request, queryset, search_term)
        return found

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
    return value if isinstance(value, str) else readable(value)
