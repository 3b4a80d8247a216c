"""Prices: what the list says, and what people say otherwise. Nothing here is changed or deleted; an override is ended."""

from __future__ import annotations

from datetime import datetime
from typing import Any, ClassVar

from django import forms
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied, ValidationError
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from audit.admin import AuditedAdmin, VersionedForm, write
from providers.admin.badges import ago, badge
from providers.models import Provider
from proxy import prices
from proxy.models import ModelPrice
from proxy.models.prices import BEGINNING, MOST_RATE, PriceSource
from proxy.pricing import dollars_of, nano_of

COLOURS = {PriceSource.OVERRIDE: "info", PriceSource.SELF_HOSTED: "plain", PriceSource.PACKAGE: "plain"}
PER_MILLION = "US dollars for a million tokens."


class DollarsField(forms.DecimalField):
    """US dollars, typed and shown; a whole number of nano-dollars for everybody else."""

    def __init__(self, **kwargs: Any) -> None:
        widget = UnfoldAdminTextInputWidget(attrs={"inputmode": "decimal", "placeholder": "0.15"})
        super().__init__(
            min_value=0,
            max_value=dollars_of(MOST_RATE),
            max_digits=16,
            decimal_places=9,
            widget=widget,
            **kwargs,
        )

    def clean(self, value: Any) -> Any:
        dollars = super().clean(value)
        return None if dollars is None else nano_of(dollars)


class PriceForm(VersionedForm):
    """A new override; what is there is only shown."""

    provider_row = forms.ModelChoiceField(
        Provider.objects.order_by("name"), label="Provider", widget=UnfoldAdminSelectWidget()
    )
    prompt = DollarsField(label="Prompt", help_text=PER_MILLION)
    completion = DollarsField(label="Completion", help_text=PER_MILLION)
    cached = DollarsField(
        label="Cached prompt",
        required=False,
        help_text=f"{PER_MILLION} Empty: as the other tokens of the prompt.",
    )
    cache_write = DollarsField(
        label="Written to a cache",
        required=False,
        help_text=f"{PER_MILLION} Empty: as the other tokens of the prompt.",
    )
    reasoning = DollarsField(
        label="Reasoning",
        required=False,
        help_text=f"{PER_MILLION} Empty: as the other tokens of the completion.",
    )
    request = DollarsField(
        label="Each request",
        required=False,
        help_text="US dollars for a request, whatever its tokens. Empty: nothing.",
    )

    class Meta:
        model = ModelPrice
        fields: ClassVar[list[str]] = []
        help_texts: ClassVar = {
            "model": "The name that the provider knows the model by; * stands for anything. Example: gpt-4o*",
            "effective_from": "UTC. Empty: now. Never in the past.",
            "effective_until": "UTC. Empty: until the next one of this name begins, or somebody ends it.",
            "note": "Why, for whoever reads it later.",
        }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "effective_from" in self.fields:
            # Not filled with the moment at which the page was opened: that lies in the past when it is sent.
            self.fields["effective_from"].required = False
            self.initial["effective_from"] = None

    def clean_effective_from(self) -> datetime:
        return self.cleaned_data.get("effective_from") or timezone.now()

    def clean_request(self) -> int:
        return self.cleaned_data.get("request") or 0

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]  # Django's own hook
        if self.errors or self.instance.pk:
            return
        try:
            prices.check_override(self.instance, self.cleaned_data["provider_row"])
        except ValidationError as error:
            self.add_error(None, error)


class CurrentFilter(admin.SimpleListFilter):
    """What holds now, unless somebody wants to see all."""

    title = "state"
    parameter_name = "state"

    def lookups(self, request: HttpRequest, model_admin: Any) -> list[tuple[str, str]]:
        return [("all", "All, history too"), ("history", "History and to come")]

    def choices(self, changelist: Any) -> Any:
        first, *others = super().choices(changelist)
        return [{**first, "display": "Holds now"}, *others]

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        if self.value() == "all":
            return queryset
        return queryset.filter(is_current=self.value() != "history")


@admin.register(ModelPrice)
class ModelPriceAdmin(AuditedAdmin):
    form = PriceForm
    list_display = (
        "model",
        "of",
        "prompt_price",
        "completion_price",
        "cached_price",
        "since",
        "state",
        "origin",
    )
    list_filter = (CurrentFilter, "source", "vendor", "provider")
    search_fields = ("model", "vendor", "provider", "note")
    search_help_text = "Search by model, provider or note. Prices are US dollars for a million tokens."
    actions = None
    object_views = (("end", "end_view"),)
    change_form_outer_before_template = "admin/proxy/price_card.html"
    fieldsets = (
        (None, {"fields": ("provider_row", "model", "note")}),
        ("Price", {"fields": ("prompt", "completion", "cached", "cache_write", "reasoning", "request")}),
        ("When", {"fields": ("effective_from", "effective_until")}),
    )
    shown: ClassVar = (
        (None, {"fields": ("of", "model", "origin", "note")}),
        (
            "Price",
            {
                "fields": (
                    "prompt_price", "completion_price", "cached_price", "cache_write_price", "reasoning_price", "request_price",
                    "tiers_shown", "hours_shown",
                )
            },
        ),
        ("When", {"fields": ("effective_from", "effective_until", "created_by", "created_at")}),
    )  # fmt: skip

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return prices.with_state(super().get_queryset(request))

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        return self.fieldsets if obj is None else self.shown

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        return () if obj is None else [name for _, part in self.shown for name in part["fields"]]

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        """Of nobody: a price that was billed by stays what it was."""
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        obj.created_by = request.user.get_username()
        prices.add_override(obj, form.cleaned_data["provider_row"])

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        obj = kwargs.get("obj")
        if obj is not None:
            can_end = can_be_ended(obj) and may_end(request)
            context = {**context, "price_state": self.state(obj), "price_can_end": can_end}
        return super().render_change_form(request, context, *args, **kwargs)

    def end_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        """A question when asked by GET, the deed when sent by POST."""
        if not may_end(request):
            raise PermissionDenied
        if request.method == "POST":
            return write(request, lambda: self._ended(request, self._open(request, object_id)))
        price = self._open(request, object_id)
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": f"End {price}?",
            "price": price,
        }
        return TemplateResponse(request, "admin/proxy/price_end.html", context)

    def _open(self, request: HttpRequest, object_id: str) -> ModelPrice:
        price = self.get_object(request, object_id)
        if price is None or not can_be_ended(price):
            raise Http404
        return price  # type: ignore[no-any-return]  # of this admin's model

    def _ended(self, request: HttpRequest, price: ModelPrice) -> HttpResponse:
        prices.end_override(price)
        messages.success(request, f"The price of {price} has ended. It stays in the history.")
        return HttpResponseRedirect(reverse("admin:proxy_modelprice_changelist"))

    @admin.display(description="Of", ordering="provider")
    def of(self, row: ModelPrice) -> str:
        return row.provider or row.vendor

    @admin.display(description="Prompt / M", ordering="prompt")
    def prompt_price(self, row: ModelPrice) -> str:
        return dollars(row.prompt, row.tiers.get("prompt"))

    @admin.display(description="Completion / M", ordering="completion")
    def completion_price(self, row: ModelPrice) -> str:
        return dollars(row.completion, row.tiers.get("completion"))

    @admin.display(description="Cached / M", ordering="cached")
    def cached_price(self, row: ModelPrice) -> str:
        return dollars(row.cached, row.tiers.get("cached"))

    @admin.display(description="Written to a cache / M")
    def cache_write_price(self, row: ModelPrice) -> str:
        return dollars(row.cache_write, row.tiers.get("cache_write"))

    @admin.display(description="Reasoning / M")
    def reasoning_price(self, row: ModelPrice) -> str:
        return dollars(row.reasoning, row.tiers.get("reasoning"))

    @admin.display(description="Each request")
    def request_price(self, row: ModelPrice) -> str:
        return dollars(row.request)

    @admin.display(description="Long prompts")
    def tiers_shown(self, row: ModelPrice) -> str:
        parts = (
            f"{name.replace('_', ' ')} {dollars(rate)} above {start:,} tokens"
            for name, tiers in row.tiers.items()
            for start, rate in tiers
        )
        return "; ".join(parts) or "-"

    @admin.display(description="Hours of the day (UTC)")
    def hours_shown(self, row: ModelPrice) -> str:
        parts = (
            f"{each['from'] // 3600:02}:{each['from'] // 60 % 60:02}-{each['until'] // 3600:02}:{each['until'] // 60 % 60:02}: "
            f"prompt {dollars(each['prompt'])}, completion {dollars(each['completion'])}"
            for each in row.hours
        )
        return "; ".join(parts) or "-"

    @admin.display(description="Since", ordering="effective_from")
    def since(self, row: ModelPrice) -> str:
        return "ever" if row.effective_from == BEGINNING else f"{row.effective_from:%Y-%m-%d %H:%M}"

    @admin.display(description="State")
    def state(self, row: Any) -> SafeString:
        if row.is_current:
            return badge("holds now", "good")
        if row.effective_from > timezone.now():
            return badge(f"from {row.effective_from:%Y-%m-%d %H:%M}", "info")
        if row.effective_until is not None:
            return badge(f"ended {ago(row.effective_until)}", "plain")
        return badge("replaced", "plain", "A newer price of the list holds.")

    @admin.display(description="Source", ordering="source")
    def origin(self, row: ModelPrice) -> SafeString:
        return badge(str(row.get_source_display()).lower(), COLOURS[PriceSource(row.source)])


def dollars(nano: int | None, tiers: Any = None) -> str:
    """ "$2.5", with a plus where long prompts cost something else; a dash where there is no price of its own."""
    return "-" if nano is None else f"${dollars_of(nano):f}{'+' if tiers else ''}"


def can_be_ended(row: ModelPrice) -> bool:
    open_end = row.effective_until is None or row.effective_until > timezone.now()
    return row.source == PriceSource.OVERRIDE and open_end


def may_end(request: HttpRequest) -> bool:
    return request.user.has_perm("proxy.change_modelprice")
