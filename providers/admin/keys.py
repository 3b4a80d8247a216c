"""API keys of vendors and servers; what is stored never comes out."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.safestring import SafeString

from audit.admin import AuditedAdmin
from audit.roles import may
from providers import keys
from providers.admin.badges import ago, badge, counted, spent
from providers.admin.forms import ApiKeyForm
from providers.admin.places import uses_of_keys
from providers.models import ApiKey, KeyUse
from providers.models.limited import LIMITS


@admin.register(ApiKey)
class ApiKeyAdmin(AuditedAdmin):
    form = ApiKeyForm
    list_display = (
        "name",
        "provider",
        "stored",
        "state",
        "weight",
        "requests",
        "tokens",
        "cost",
        "last_used",
    )
    list_filter = ("enabled", "is_default", "provider")
    list_select_related = ("provider", "use")
    search_fields = ("name", "provider__name")
    derived = (KeyUse,)
    fieldsets = (
        (None, {"fields": ("provider", "name", "api_key", "enabled")}),
        ("Several keys of one provider", {"fields": ("is_default", "weight")}),
        (
            "Limits",
            {
                "fields": LIMITS,
                "description": "What is asked with this key at the most, to stay below the vendor's own limits. Requests beyond "
                "that go to the next key or provider. Empty: no limit.",
            },
        ),
        ("Notes", {"classes": ("collapse",), "fields": ("metadata",)}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[ApiKey]:
        return super().get_queryset(request).select_related("provider", "use")

    @admin.display(description="Stored key")
    def stored(self, key: ApiKey) -> str:
        return key.masked_key

    @admin.display(description="State")
    def state(self, key: ApiKey) -> SafeString:
        use = getattr(key, "use", None)
        if not key.enabled:
            return badge("off")
        if use is not None and use.undecryptable_at is not None:
            return badge(f"does not open, seen {ago(use.undecryptable_at)}", "bad")
        if use is not None and use.rejected_at is not None:
            return badge(f"refused by the provider {ago(use.rejected_at)}", "bad")
        return badge("default", "good") if key.is_default else badge("in use", "good")

    @admin.display(description="Requests", ordering="use__requests_count")
    def requests(self, key: ApiKey) -> str:
        return counted(key, "requests_count")

    @admin.display(description="Tokens", ordering="use__tokens_used")
    def tokens(self, key: ApiKey) -> str:
        return counted(key, "tokens_used")

    @admin.display(description="Cost", ordering="use__cost_nanodollars")
    def cost(self, key: ApiKey) -> str:
        return spent(key)

    @admin.display(description="Last used", ordering="use__last_used_at")
    def last_used(self, key: ApiKey) -> str:
        use = getattr(key, "use", None)
        return ago(use.last_used_at if use is not None else None)

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """A key stays with its provider, for whose address it is sealed; an operator may replace the secret only."""
        if obj is None:
            return ()
        if may(request.user, "api_keys", "change"):
            return ("provider",)
        return ("provider", "name", "enabled", "is_default", "weight", *LIMITS, "metadata")

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        form.user = request.user  # type: ignore[attr-defined]  # a fresh class for each request
        return form

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        value = form.cleaned_data.get("api_key")
        if not change:
            obj.created_by = request.user.get_username()
            keys.add(obj, value)
            return
        if obj.is_default:
            keys.clear_default(obj.provider, but=obj)
        if value:
            keys.store(obj, value)
        super().save_model(request, obj, form, change)

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        listed, counts, lacking, protected = super().get_deleted_objects(objs, request)
        return listed, counts, lacking, uses_of_keys(objs) if protected else protected
