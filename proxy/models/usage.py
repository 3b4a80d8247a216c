"""What every attempt at a provider was worth, and which pieces of the spool are already counted."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.db.models import Q

COUNTS = (
    "prompt_tokens",
    "completion_tokens",
    "cached_tokens",
    "cache_write_tokens",
    "reasoning_tokens",
    "bytes_out",
)
"""Columns that are never null and never negative."""

TIMES = ("ttft_ms", "duration_ms")
"""Columns that are null when unknown and never negative."""


def _not_negative() -> list[models.CheckConstraint]:
    return [
        models.CheckConstraint(condition=Q(**{f"{name}__gte": 0}), name=f"usage_{name}_is_not_negative")
        for name in (*COUNTS, *TIMES)
    ]


class UsageStatus(models.TextChoices):
    """How an attempt ended; `interrupted` is one that never did, because its worker died or was told to stop."""

    SUCCESS = "success", "Success"
    ERROR = "error", "Error"
    CLIENT_DISCONNECTED = "client_disconnected", "Client disconnected"
    INTERRUPTED = "interrupted", "Interrupted"
    UPSTREAM_STALLED = "upstream_stalled", "Upstream stalled"
    UPSTREAM_INTERRUPTED = "upstream_interrupted", "Upstream interrupted"


class TokensSource(models.TextChoices):
    PROVIDER = "provider", "Provider"
    ESTIMATED = "estimated", "Estimated"
    NONE = "none", "None"


class UsageRecord(models.Model):
    """One attempt. It holds ids and names and no foreign keys, so that deleting a provider or a key never rewrites history.

    id: the attempt's own UUIDv7, made by the worker; request_id is the caller's, correlates and may repeat.
    prompt_tokens includes cached_tokens; where tokens_source is `none`, nobody knows and all token counts are 0.
    cost_nanodollars: 10^-9 US dollars, by the row `price_id` of ModelPrice; both null where no price is known, which is not the
        same as free. An attempt that the provider did not take costs 0 if its model's price is known. One whose worker died is
        null: nobody knows what the provider did with it.
    """

    Status = UsageStatus
    TokensSource = TokensSource
    UNPRICED: ClassVar = Q(cost_nanodollars=None) & ~Q(tokens_source=TokensSource.NONE)

    id = models.UUIDField(primary_key=True, editable=False)
    request_id = models.CharField(max_length=128, blank=True)
    attempt = models.PositiveSmallIntegerField(default=1)
    created_at = models.DateTimeField()
    gateway_key_id = models.BigIntegerField(null=True, blank=True)
    gateway_key = models.CharField(max_length=100, blank=True)
    owner = models.CharField(max_length=150, blank=True)
    route = models.CharField(max_length=255, blank=True)
    provider_id = models.BigIntegerField(null=True, blank=True)
    provider = models.CharField(max_length=100, blank=True)
    api_key_id = models.BigIntegerField("API key id", null=True, blank=True)
    requested_model = models.CharField(max_length=255, blank=True)
    model = models.CharField(max_length=255, blank=True)
    purpose = models.CharField(max_length=32, blank=True)
    status = models.CharField(max_length=32, choices=UsageStatus)
    error_code = models.CharField(max_length=64, blank=True)
    http_status = models.PositiveSmallIntegerField("HTTP status", null=True, blank=True)
    prompt_tokens = models.BigIntegerField(default=0)
    completion_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    cache_write_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    tokens_source = models.CharField(max_length=16, choices=TokensSource, default=TokensSource.NONE)
    cost_nanodollars = models.BigIntegerField(null=True, blank=True)
    price_id = models.BigIntegerField(null=True, blank=True)
    ttft_ms = models.BigIntegerField("time to first token (ms)", null=True, blank=True)
    duration_ms = models.BigIntegerField("duration (ms)", null=True, blank=True)
    bytes_out = models.BigIntegerField(default=0)
    stream = models.BooleanField(default=False)
    client_disconnected = models.BooleanField(default=False)
    trace = models.JSONField(null=True, blank=True)

    class Meta:
        verbose_name = "usage record"
        ordering: ClassVar = ["-created_at", "-id"]
        indexes: ClassVar = [
            models.Index(fields=["created_at"], name="usage_created"),
            models.Index(fields=["request_id"], name="usage_request"),
            models.Index(fields=["gateway_key_id", "created_at"], name="usage_gateway_key_created"),
            models.Index(fields=["provider_id", "created_at"], name="usage_provider_created"),
            models.Index(
                fields=["created_at"],
                condition=Q(cost_nanodollars=None) & ~Q(tokens_source=TokensSource.NONE),
                name="usage_unpriced",
            ),
        ]
        constraints: ClassVar = [
            *_not_negative(),
            models.CheckConstraint(
                condition=Q(cost_nanodollars__gte=0) | Q(cost_nanodollars=None),
                name="usage_cost_is_not_negative",
            ),
            models.CheckConstraint(condition=Q(status__in=UsageStatus.values), name="usage_status_is_known"),
            models.CheckConstraint(
                condition=Q(tokens_source__in=TokensSource.values), name="usage_tokens_source_is_known"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.id} {self.provider}/{self.model} {self.status}"

    @property
    def unpriced(self) -> bool:
        """Whether a provider answered and nobody knows what that cost: the record's flag, never a silent 0."""
        return self.cost_nanodollars is None and self.tokens_source != TokensSource.NONE

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


GRAIN = (
    "gateway_key_id",
    "gateway_key",
    "owner",
    "route",
    "provider_id",
    "provider",
    "api_key_id",
    "model",
    "purpose",
    "status",
)
"""What records must have in common to be added up, besides their hour."""


class UsageHour(models.Model):
    """The sums of the records of one hour (UTC) that are alike in GRAIN. It outlives the records that it was added up from.

    id: a digest of the hour and the grain (see proxy.usage_hours): one narrow key, where nulls and long names would need a wide one.
    requests: records that are a request's first attempt; attempts: all. unpriced: those whose cost is not known, and so not in
    cost_nanodollars. estimated: those whose tokens we had to count ourselves. duration_count, ttft_count: those whose time is known.
    """

    id = models.UUIDField(primary_key=True, editable=False)
    hour = models.DateTimeField(db_index=True)
    gateway_key_id = models.BigIntegerField(null=True)
    gateway_key = models.CharField(max_length=100, blank=True)
    owner = models.CharField(max_length=150, blank=True)
    route = models.CharField(max_length=255, blank=True)
    provider_id = models.BigIntegerField(null=True)
    provider = models.CharField(max_length=100, blank=True)
    api_key_id = models.BigIntegerField(null=True)
    model = models.CharField(max_length=255, blank=True)
    purpose = models.CharField(max_length=32, blank=True)
    status = models.CharField(max_length=32, choices=UsageStatus)
    requests = models.BigIntegerField(default=0)
    attempts = models.BigIntegerField(default=0)
    prompt_tokens = models.BigIntegerField(default=0)
    completion_tokens = models.BigIntegerField(default=0)
    cached_tokens = models.BigIntegerField(default=0)
    cache_write_tokens = models.BigIntegerField(default=0)
    reasoning_tokens = models.BigIntegerField(default=0)
    cost_nanodollars = models.BigIntegerField(default=0)
    unpriced = models.BigIntegerField(default=0)
    estimated = models.BigIntegerField(default=0)
    duration_ms = models.BigIntegerField(default=0)
    duration_count = models.BigIntegerField(default=0)
    ttft_ms = models.BigIntegerField(default=0)
    ttft_count = models.BigIntegerField(default=0)

    class Meta:
        verbose_name = "usage of an hour"
        ordering: ClassVar = ["-hour", "id"]

    def __str__(self) -> str:
        return f"{self.hour:%Y-%m-%d %H}:00 {self.gateway_key} {self.provider}/{self.model}"


class SpoolSegment(models.Model):
    """The name of a piece of the spool whose records are in; it is written with them, so they are never counted twice."""

    name = models.CharField(max_length=64, unique=True)
    drained_at = models.DateTimeField(db_index=True)
    records = models.PositiveIntegerField(default=0)

    class Meta:
        verbose_name = "spool segment"
        ordering: ClassVar = ["-drained_at"]

    def __str__(self) -> str:
        return self.name
