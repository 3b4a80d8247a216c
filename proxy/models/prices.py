"""What models cost: dated rows that are never changed or deleted, so that what a bill was made of can always be read."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from django.core.validators import MaxValueValidator
from django.db import models
from django.db.models import F, Q
from django.utils import timezone

from audit.changes import Identity
from proxy.pricing import Price, Rate

BEGINNING = datetime(2000, 1, 1, tzinfo=UTC)
"""Since when a price holds whose beginning nobody knows."""
MOST_RATE = 10**15
"""A million dollars for a million tokens, or for a request: above that it is a mistake."""
PARTS = ("prompt", "completion", "cached", "cache_write", "reasoning")
"""What has a rate of its own, in nano-dollars per million tokens."""
RATES = (*PARTS, "request", "tiers", "hours")
"""The columns that make a price."""

NEVER_HELD = Q(effective_until=F("effective_from"))
"""Rows whose place another one took before they began."""


class PriceSource(models.TextChoices):
    PACKAGE = "package", "Price list"
    SELF_HOSTED = "self-hosted", "Self-hosted"
    OVERRIDE = "override", "Override"


class ModelPrice(models.Model):
    """What a model costs from a moment on. Of a row only `effective_until` ever changes, and only once, to a time to come.

    vendor: whose price list it is from, which is a kind of provider or the name that genai-prices has; `model` is the model's
    name there, and `match` says which names mean it (see proxy.price_book).
    provider_id, provider: of an override, whose `model` is a name that may hold `*`. No foreign key: history outlives a provider.
    The rates are nano-dollars per million tokens, `request` is nano-dollars per request; null costs what other tokens of the
    prompt or completion cost. tiers: {"prompt": [[tokens, rate], ...], ...}; hours: prices of hours of the day, in UTC.
    """

    Source = PriceSource

    source = models.CharField(max_length=16, choices=PriceSource, editable=False)
    vendor = models.CharField(max_length=32, blank=True, editable=False)
    provider_id = models.BigIntegerField(null=True, blank=True, editable=False)
    provider = models.CharField(max_length=63, blank=True, editable=False)
    model = models.CharField(max_length=255)
    match = models.JSONField(null=True, blank=True, editable=False)
    effective_from = models.DateTimeField("since", default=timezone.now)
    effective_until = models.DateTimeField("until", null=True, blank=True)
    prompt = models.BigIntegerField(validators=[MaxValueValidator(MOST_RATE)])
    completion = models.BigIntegerField(validators=[MaxValueValidator(MOST_RATE)])
    cached = models.BigIntegerField(null=True, blank=True, validators=[MaxValueValidator(MOST_RATE)])
    cache_write = models.BigIntegerField(null=True, blank=True, validators=[MaxValueValidator(MOST_RATE)])
    reasoning = models.BigIntegerField(null=True, blank=True, validators=[MaxValueValidator(MOST_RATE)])
    request = models.BigIntegerField(default=0, validators=[MaxValueValidator(MOST_RATE)])
    tiers = models.JSONField(default=dict, blank=True, editable=False)
    hours = models.JSONField(default=list, blank=True, editable=False)
    note = models.CharField(max_length=255, blank=True)
    created_by = models.CharField(max_length=150, blank=True, editable=False)
    created_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        verbose_name = "price"
        ordering: ClassVar = ["vendor", "provider", "model", "-effective_from", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["vendor", "model"], name="price_vendor_model"),
            models.Index(fields=["provider_id", "model"], name="price_provider_model"),
        ]
        constraints: ClassVar = [
            *(
                models.CheckConstraint(
                    condition=Q(**{name: None}) | Q(**{f"{name}__gte": 0, f"{name}__lte": MOST_RATE}),
                    name=f"price_{name}_is_in_range",
                )
                for name in (*PARTS, "request")
            ),
            models.CheckConstraint(
                condition=Q(source="override", vendor="", provider_id__isnull=False)
                | (Q(source__in=["package", "self-hosted"], provider_id=None) & ~Q(vendor="")),
                name="price_is_of_a_vendor_or_a_provider",
            ),
            models.CheckConstraint(
                condition=Q(effective_until=None) | Q(effective_until__gte=F("effective_from")),
                name="price_does_not_end_before_it_begins",
            ),
            models.CheckConstraint(condition=~Q(model=""), name="price_has_a_model"),
        ]

    def __str__(self) -> str:
        return f"{self.provider or self.vendor}/{self.model}"

    @property
    def version(self) -> int:
        """What changes when the row does: it was ended, or it was not."""
        return 1 if self.effective_until is None else 2

    def audit_identity(self) -> Identity:
        return Identity("model_price", str(self.pk), str(self), "price")

    def price(self) -> Price:
        """Raises ValueError for a row that was written past the forms and makes no sense."""
        return price_of(self.pk, {name: getattr(self, name) for name in RATES})


class PriceList(models.Model):
    """What is known of the package that prices are taken from. One row; not configuration, so it is not watched."""

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    package_version = models.CharField(max_length=64, blank=True)
    checked_at = models.DateTimeField(null=True)
    problem = models.CharField(max_length=255, blank=True)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(condition=Q(id=1), name="price_list_is_one_row"),
        ]

    def __str__(self) -> str:
        return self.package_version


def price_of(id: int, values: Any) -> Price:
    """A price of a mapping with the names of RATES. ValueError when a number in it is none."""
    tiers = values.get("tiers") or {}
    rates = {name: _rate(values.get(name), tiers.get(name, ())) for name in PARTS}
    return Price(
        id=id,
        prompt=rates["prompt"] or Rate(),
        completion=rates["completion"] or Rate(),
        cached=rates["cached"],
        cache_write=rates["cache_write"],
        reasoning=rates["reasoning"],
        request=_whole(values.get("request") or 0),
    )


def _rate(base: Any, tiers: Any) -> Rate | None:
    if base is None:
        return None
    return Rate(_whole(base), tuple((_whole(start), _whole(rate)) for start, rate in tiers))


def _whole(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_RATE:
        raise ValueError
    return value
