"""What was asked and what it was worth; only looked at."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import URLPattern, path, reverse
from django.utils.html import format_html
from django.utils.http import urlencode
from django.utils.safestring import SafeString

from audit.admin import ReadOnlyAdmin
from audit.api import Counted
from providers.admin.badges import badge
from proxy.admin.report import report_view
from proxy.admin.trace import way_of
from proxy.admin.usage_filters import Days, GatewayKeyFilter, ModelFilter, OwnerFilter, ProviderFilter
from proxy.models import UsageRecord

COLOURS = {"success": "good", "error": "bad", "client_disconnected": "plain"}


class UnpricedFilter(admin.SimpleListFilter):
    title = "price"
    parameter_name = "price"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("unknown", "Unknown")]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        return queryset.filter(UsageRecord.UNPRICED) if self.value() == "unknown" else queryset


@admin.register(UsageRecord)
class UsageRecordAdmin(ReadOnlyAdmin):
    list_display = (
        "created_at",
        "gateway_key",
        "provider",
        "model",
        "ended",
        "tokens_in",
        "tokens_out",
        "cost",
        "first_token",
        "duration",
    )
    list_display_links = ("created_at",)
    list_filter = (
        ("created_at", Days),
        "created_at",
        "status",
        GatewayKeyFilter,
        ProviderFilter,
        ModelFilter,
        OwnerFilter,
        "stream",
        UnpricedFilter,
    )
    list_filter_submit = True
    extra_lookups = frozenset({"created_at_from", "created_at_to"})
    # Only what an index finds: there may be millions of records.
    search_fields = ("request_id__exact",)
    search_help_text = (
        f"Search by request id. Lists the newest {Counted.EXACT:,} records that match; times are UTC."
    )
    paginator = Counted
    change_form_outer_before_template = "admin/proxy/way.html"
    fieldsets = (
        (
            "Request",
            {
                "fields": (
                    "request_id",
                    "id",
                    "created_at",
                    "gateway_key",
                    "owner",
                    "purpose",
                    "stream",
                    "attempt",
                )
            },
        ),
        ("Where it went", {"fields": ("route", "requested_model", "provider", "model", "api_key_id")}),
        (
            "How it ended",
            {
                "fields": (
                    "status",
                    "error_code",
                    "http_status",
                    "ttft_ms",
                    "duration_ms",
                    "bytes_out",
                    "client_disconnected",
                )
            },
        ),
        (
            "Tokens and cost",
            {
                "fields": (
                    "prompt_tokens",
                    "completion_tokens",
                    "cached_tokens",
                    "cache_write_tokens",
                    "reasoning_tokens",
                    "tokens_source",
                    "cost",
                    "price",
                )
            },
        ),
    )

    def get_urls(self) -> list[URLPattern]:
        page = path("report/", self.admin_site.admin_view(report_view), name="proxy_usagerecord_report")
        return [page, *super().get_urls()]

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        record = kwargs.get("obj")
        if record is not None:
            others = f"{reverse('admin:proxy_usagerecord_changelist')}?{urlencode({'q': record.request_id})}"
            context = {**context, "way": way_of(record.trace), "way_others": others}
        return super().render_change_form(request, context, *args, **kwargs)

    @admin.display(description="Status", ordering="status")
    def ended(self, record: UsageRecord) -> SafeString:
        text = str(record.get_status_display()).lower()
        if record.error_code:
            text = f"{text}: {record.error_code}"
        return badge(text, COLOURS.get(record.status, "warn"))

    @admin.display(description="In", ordering="prompt_tokens")
    def tokens_in(self, record: UsageRecord) -> str:
        return counted(record, record.prompt_tokens)

    @admin.display(description="Out", ordering="completion_tokens")
    def tokens_out(self, record: UsageRecord) -> str:
        return counted(record, record.completion_tokens)

    @admin.display(description="Cost", ordering="cost_nanodollars")
    def cost(self, record: UsageRecord) -> str:
        if record.unpriced:
            return badge("price unknown", "warn", "Nobody knows what this model costs; see Prices.")
        return "-" if record.cost_nanodollars is None else f"${record.cost_nanodollars / 1e9:.6f}"

    @admin.display(description="Price")
    def price(self, record: UsageRecord) -> str:
        """The row that it was billed by, as it was then and is now."""
        if record.price_id is None:
            return "-"
        address = reverse("admin:proxy_modelprice_change", args=[record.price_id])
        return format_html('<a class="ps-link" href="{}">number {}</a>', address, record.price_id)

    @admin.display(description="First token", ordering="ttft_ms")
    def first_token(self, record: UsageRecord) -> str:
        return "-" if record.ttft_ms is None else f"{record.ttft_ms} ms"

    @admin.display(description="Took", ordering="duration_ms")
    def duration(self, record: UsageRecord) -> str:
        return "-" if record.duration_ms is None else f"{record.duration_ms} ms"


def counted(record: UsageRecord, tokens: int) -> str:
    """Token counts say when nobody knows them, or when they are our estimate."""
    if record.tokens_source == UsageRecord.TokensSource.NONE:
        return "-"
    return f"~{tokens}" if record.tokens_source == UsageRecord.TokensSource.ESTIMATED else str(tokens)
