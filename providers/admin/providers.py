"""Vendors and servers of our own: one model, two menu entries."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin, messages
from django.db.models import Count, Q, QuerySet
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.safestring import SafeString

from audit.admin import AuditedAdmin
from audit.roles import may
from providers import keys
from providers.adapters import KINDS, SELF_HOSTED
from providers.admin.badges import badge, counted, health_badge, spent
from providers.admin.forms import ServerForm, VendorForm
from providers.admin.health import HealthViews
from providers.admin.places import uses_of_providers
from providers.models import HealthCheck, KeyUse, Provider, ProviderHealth, ProviderUse, Server, UpstreamModel

PURPOSES = ("use_for_chat", "use_for_embeddings", "use_for_reranking")
TIMEOUTS = (
    "connect_timeout_seconds",
    "first_token_timeout_seconds",
    "idle_timeout_seconds",
    "request_timeout_seconds",
)


class HealthFilter(admin.SimpleListFilter):
    title = "health"
    parameter_name = "health"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("healthy", "Healthy"), ("failing", "Failing or down"), ("unknown", "Not checked yet")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any] | None:
        unchecked = Q(health=None) | Q(health__last_checked_at=None)
        if self.value() == "healthy":
            return queryset.filter(health__health_status="healthy", health__is_healthy=True)
        if self.value() == "failing":
            return queryset.filter(
                Q(health__health_status__in=["degraded", "down"]) | Q(health__is_healthy=False)
            )
        return queryset.filter(unchecked) if self.value() == "unknown" else None


class EndpointAdmin(HealthViews, AuditedAdmin):
    """What servers and vendors share."""

    list_display: Any = (
        "name",
        "health_now",
        "models",
        "stored_keys",
        "kind",
        "address",
        "priority",
        "requests",
        "tokens",
        "cost",
    )
    list_filter: ClassVar[Any] = ("enabled", HealthFilter, "kind", *PURPOSES)
    list_select_related: ClassVar[Any] = ("health", "use")
    ordering: ClassVar[Any] = ("-enabled", "priority", "id")
    search_fields = ("name", "slug", "base_url")
    search_help_text = "Search by name, slug or address"
    derived = (ProviderHealth, ProviderUse, HealthCheck, KeyUse, UpstreamModel)
    kinds: ClassVar[frozenset[str]]

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        counts = {
            "keys_count": Count("keys", filter=Q(keys__enabled=True), distinct=True),
            "models_known": Count("upstream_models", filter=Q(upstream_models__enabled=True), distinct=True),
        }
        queryset: QuerySet[Any] = super().get_queryset(request)
        annotated: QuerySet[Any] = queryset.filter(kind__in=self.kinds).annotate(**counts)
        return annotated

    @admin.display(description="Address", ordering="base_url")
    def address(self, provider: Provider) -> str:
        return provider.base_url

    @admin.display(description="Health")
    def health_now(self, provider: Provider) -> SafeString:
        return health_badge(provider)

    @admin.display(description="Models", ordering="models_known")
    def models(self, provider: Any) -> int:
        return int(provider.models_known)

    @admin.display(description="Keys", ordering="keys_count")
    def stored_keys(self, provider: Any) -> SafeString | str:
        if provider.keys_count:
            return str(provider.keys_count)
        return badge("needs a key", "warn") if KINDS[provider.kind].needs_key else "-"

    @admin.display(description="Requests", ordering="use__requests_count")
    def requests(self, provider: Provider) -> str:
        return counted(provider, "requests_count")

    @admin.display(description="Tokens", ordering="use__tokens_used")
    def tokens(self, provider: Provider) -> str:
        return counted(provider, "tokens_used")

    @admin.display(description="Cost", ordering="use__cost_nanodollars")
    def cost(self, provider: Provider) -> str:
        return spent(provider)

    def get_form(self, request: HttpRequest, obj: Any = None, change: bool = False, **kwargs: Any) -> Any:
        form = super().get_form(request, obj, change, **kwargs)
        form.user = request.user  # type: ignore[attr-defined]  # a fresh class for each request
        if not may(request.user, "api_keys", "replace" if obj else "add"):
            form.base_fields.pop("api_key", None)
        return form

    def formfield_for_choice_field(self, db_field: Any, request: HttpRequest, **kwargs: Any) -> Any:
        if db_field.name == "kind":
            kwargs["choices"] = [(name, kind.label) for name, kind in KINDS.items() if name in self.kinds]
        return super().formfield_for_choice_field(db_field, request, **kwargs)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        value = form.cleaned_data.get("api_key")
        moved = change and "base_url" in form.changed_data and self._moved(obj)
        super().save_model(request, obj, form, change)
        if value:
            self._store_key(request, obj, value, moved=moved)

    def _moved(self, obj: Any) -> bool:
        return keys.moves(Provider.objects.get(pk=obj.pk), obj.base_url)

    def _store_key(self, request: HttpRequest, obj: Any, value: str, *, moved: bool) -> None:
        author, was_enabled = request.user.get_username(), obj.enabled
        provider = Provider.objects.get(pk=obj.pk)
        revive = may(request.user, "api_keys", "change")
        key = keys.write_default(provider, value, created_by=author, revive=revive)
        if moved:
            keys.disable_left_behind(provider, but=key)
        if provider.enabled and not was_enabled:
            messages.info(request, f"{provider.name} has its first key, so it was enabled.")

    def get_deleted_objects(self, objs: Any, request: HttpRequest) -> Any:
        listed, counts, lacking, protected = super().get_deleted_objects(objs, request)
        return listed, counts, lacking, uses_of_providers(objs) if protected else protected


@admin.register(Server)
class ServerAdmin(EndpointAdmin):
    form = ServerForm
    kinds = SELF_HOSTED
    fieldsets = (
        (None, {"fields": ("name", "kind", "base_url", "api_key", "enabled")}),
        ("What it is used for", {"fields": (PURPOSES, "priority")}),
        (
            "Advanced",
            {
                "classes": ("collapse",),
                "fields": (
                    "slug",
                    "custom_headers",
                    "ca_pem",
                    "probe_interval_seconds",
                    *TIMEOUTS,
                    "model_path",
                    "metadata",
                ),
            },
        ),
    )


@admin.register(Provider)
class ProviderAdmin(EndpointAdmin):
    form = VendorForm
    kinds = frozenset(KINDS) - SELF_HOSTED
    list_display = (
        "name",
        "health_now",
        "models",
        "stored_keys",
        "address",
        "priority",
        "requests",
        "tokens",
        "cost",
    )
    fieldsets = (
        (None, {"fields": ("name", "kind", "base_url", "api_key", "enabled")}),
        ("What it is used for", {"fields": (PURPOSES, "priority")}),
        (
            "Advanced",
            {
                "classes": ("collapse",),
                "fields": (
                    "slug",
                    "custom_headers",
                    "allow_private",
                    "ca_pem",
                    "probe_interval_seconds",
                    *TIMEOUTS,
                    "metadata",
                ),
            },
        ),
    )

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return () if may(request.user, "allow_private", "write") else ("allow_private",)

    def change_view(
        self, request: HttpRequest, object_id: str, form_url: str = "", extra_context: Any = None
    ) -> HttpResponse:
        """Servers share the numbers of providers, and links by number may mean either."""
        if self.admin_site.get_model_admin(Server).get_object(request, object_id) is not None:
            return HttpResponseRedirect(reverse("admin:providers_server_change", args=[object_id]))
        return super().change_view(request, object_id, form_url, extra_context)
