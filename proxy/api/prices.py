"""Prices of models: read, and overridden. What is there is never changed or deleted; an override can be ended."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, ClassVar

from django.db.models import QuerySet
from django.utils import timezone
from django_filters import rest_framework as filters
from drf_spectacular.utils import extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.fields import empty
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_errors import Conflict
from audit.api_views import KeptRows, StrictSerializer
from providers.api.values import provider_named
from providers.models import Provider
from proxy import prices
from proxy.models import ModelPrice
from proxy.models.prices import MOST_RATE, PARTS, PriceSource
from proxy.pricing import dollars_of, nano_of

PER_MILLION = "US dollars for a million tokens."
AS_OTHERS = "US dollars for a million tokens; null: as other tokens of the prompt."


@extend_schema_field({"type": "string", "description": "A provider's slug; its id is accepted too."})
class ProviderField(serializers.Field[Any, Any, Any, Any]):
    def to_representation(self, value: str) -> str:
        return value

    def to_internal_value(self, data: Any) -> Provider:
        return provider_named(data)


class DollarsField(serializers.DecimalField):
    """US dollars as decimal text; in the database a whole number of nano-dollars."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            max_digits=16, decimal_places=9, min_value=Decimal(0), max_value=dollars_of(MOST_RATE), **kwargs
        )

    def to_representation(self, value: Any) -> str:
        return f"{dollars_of(value):f}"

    def run_validation(self, data: Any = empty) -> Any:
        dollars = super().run_validation(data)
        return nano_of(dollars) if isinstance(dollars, Decimal) else dollars


class PriceSerializer(StrictSerializer[ModelPrice]):
    provider = ProviderField()
    prompt_usd_per_million = DollarsField(source="prompt", help_text=PER_MILLION)
    completion_usd_per_million = DollarsField(source="completion", help_text=PER_MILLION)
    cached_usd_per_million = DollarsField(
        source="cached", required=False, allow_null=True, help_text=AS_OTHERS
    )
    cache_write_usd_per_million = DollarsField(
        source="cache_write", required=False, allow_null=True, help_text=AS_OTHERS
    )
    reasoning_usd_per_million = DollarsField(
        source="reasoning",
        required=False,
        allow_null=True,
        help_text="US dollars for a million tokens; null: as other tokens of the completion.",
    )
    request_usd = DollarsField(
        source="request", required=False, help_text="US dollars for each request, whatever its tokens."
    )
    effective_from = serializers.DateTimeField(required=False, help_text="Left out: now. Never in the past.")
    is_current = serializers.SerializerMethodField(help_text="Whether this is the price that holds now.")
    tiers = serializers.SerializerMethodField(
        help_text="Rates of requests whose prompt is longer than so many tokens."
    )
    hours = serializers.SerializerMethodField(help_text="Rates of hours of the day, in UTC.")

    class Meta:
        model = ModelPrice
        fields: ClassVar[Any] = (
            "id", "source", "vendor", "provider", "provider_id", "model", "prompt_usd_per_million", "completion_usd_per_million",
            "cached_usd_per_million", "cache_write_usd_per_million", "reasoning_usd_per_million", "request_usd", "tiers", "hours",
            "effective_from", "effective_until", "is_current", "note", "created_by", "created_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = ("source", "vendor", "provider_id", "created_by")
        extra_kwargs: ClassVar[Any] = {
            "effective_until": {
                "help_text": "Left out: where the next override of the name begins, if there is one."
            }
        }
        validators: ClassVar[list[Any]] = []

    def get_is_current(self, row: Any) -> bool:
        return bool(row.is_current)

    def get_tiers(self, row: ModelPrice) -> dict[str, list[dict[str, Any]]]:
        return _tiers(row.tiers)

    def get_hours(self, row: ModelPrice) -> list[dict[str, Any]]:
        return [
            {
                "from": _clock(each["from"]),
                "until": _clock(each["until"]),
                **{f"{name}_usd_per_million": _shown(each.get(name)) for name in PARTS},
                "request_usd": _shown(each.get("request")),
                "tiers": _tiers(each.get("tiers") or {}),
            }
            for each in row.hours
        ]

    def create(self, values: dict[str, Any]) -> ModelPrice:
        provider = values.pop("provider")
        row = ModelPrice(**values, created_by=self.user.get_username())
        prices.add_override(row, provider)
        return row


def _tiers(tiers: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {
        name: [{"above_tokens": start, "usd_per_million": _shown(rate)} for start, rate in each]
        for name, each in tiers.items()
    }


def _shown(nano: int | None) -> str | None:
    return None if nano is None else f"{dollars_of(nano):f}"


def _clock(second: int) -> str:
    return f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"


class PriceFilter(filters.FilterSet):  # type: ignore[misc]
    current = filters.BooleanFilter(field_name="is_current", label="Whether it holds now.")

    class Meta:
        model = ModelPrice
        fields: ClassVar = ["source", "vendor", "provider", "provider_id", "model"]


class Prices(KeptRows):
    """What models cost: the price list's rows, and what people said otherwise about models of a provider."""

    resource = "prices"
    words: ClassVar = {"end": "change"}
    serializer_class = PriceSerializer
    queryset = ModelPrice.objects.all()
    filterset_class = PriceFilter
    search_fields = ("model", "vendor", "provider", "note")
    ordering_fields = ("id", "vendor", "provider", "model", "prompt", "completion", "effective_from")

    def get_queryset(self) -> QuerySet[Any]:
        return prices.with_state(super().get_queryset())

    @extend_schema(request=None, responses=PriceSerializer)
    @action(detail=True, methods=["post"])
    def end(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """End an override: from now on the price list's price holds again. The row stays."""
        with self.changing():
            row = self.get_object()
            self.check_version(row)
            if row.source != PriceSource.OVERRIDE:
                raise Conflict("Only an override can be ended; make one to replace this price.")
            if row.effective_until is not None and row.effective_until <= timezone.now():
                raise Conflict("It has ended already.")
            prices.end_override(row)
        return self.shown(row)
