"""What all keys of a user or a team may do together."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from audit.admin import AuditedAdmin, VersionedForm
from providers.models.limited import LIMITS
from proxy.models import OwnerLimits
from proxy.owners import Owner, text_of


class OwnerLimitsForm(VersionedForm):
    class Meta:
        model = OwnerLimits
        fields: ClassVar[list[str]] = []
        help_texts: ClassVar = {
            "owner": "The limits are those of all keys of this person together.",
            "team": "Or of all keys of this team.",
            **dict.fromkeys(LIMITS, "Empty: no limit."),
            "max_concurrency": "Requests at the same time. Empty: no limit.",
        }


@admin.register(OwnerLimits)
class OwnerLimitsAdmin(AuditedAdmin):
    form = OwnerLimitsForm
    list_display = ("holder", *LIMITS)
    list_select_related = ("owner", "team")
    search_fields = ("owner__username", "team__name")
    search_help_text = "Search by owner"
    fieldsets = (("Whose", {"fields": ("owner", "team")}), ("Limits", {"fields": LIMITS}))

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """Limits stay with their owner."""
        return () if obj is None else ("owner", "team")

    @admin.display(description="Owner")
    def holder(self, limits: OwnerLimits) -> str:
        return text_of(limits.holder)


def limits_of(owner: Owner | None) -> SafeString | str:
    """The limits that a key inherits, in words, with the way to them."""
    if owner is None:
        return "Nothing: the key has no owner."
    limits: OwnerLimits | None = getattr(owner, "owner_limits", None)
    quota = limits.quota() if limits is not None else None
    if limits is None or quota is None:
        return f"Nothing: {text_of(owner)} has no limits."
    units = ("requests per minute", "tokens per minute", "requests at the same time")
    parts = [f"{limit} {unit}" for limit, unit in zip(quota, units, strict=True) if limit is not None]
    address = reverse("admin:proxy_ownerlimits_change", args=[limits.pk])
    return format_html('<a href="{}">{}</a>: {}', address, text_of(owner), ", ".join(parts))
