"""How providers and keys feel. None of this is configuration, so none of it is watched or versioned."""

from __future__ import annotations

from typing import ClassVar

from django.db import models
from django.utils import timezone

from providers.models.provider import ApiKey, Provider


class Status(models.TextChoices):
    """What the last probe saw."""

    ONLINE = "online", "Online"
    DEGRADED = "degraded", "Degraded"
    TIMEOUT = "timeout", "Timeout"
    UNREACHABLE = "unreachable", "Unreachable"
    ERROR = "error", "Error"
    UNKNOWN = "unknown", "Unknown"


class Verdict(models.TextChoices):
    """What follows from the probes so far."""

    HEALTHY = "healthy", "Healthy"
    DEGRADED = "degraded", "Degraded"
    DOWN = "down", "Down"
    UNKNOWN = "unknown", "Unknown"


class ProviderHealth(models.Model):
    """The present state of a provider. Routing obeys `is_healthy`."""

    provider = models.OneToOneField(
        Provider, on_delete=models.CASCADE, related_name="health", primary_key=True
    )
    status = models.CharField(max_length=16, choices=Status, default=Status.UNKNOWN)
    health_status = models.CharField(max_length=16, choices=Verdict, default=Verdict.UNKNOWN)
    is_healthy = models.BooleanField(default=True)
    override = models.BooleanField(
        null=True, blank=True, help_text="Set by a person; empty: the probes decide."
    )
    consecutive_failures = models.PositiveIntegerField(default=0)
    status_code = models.PositiveIntegerField(null=True, blank=True)
    latency_ms = models.FloatField(null=True, blank=True)
    detail = models.TextField(blank=True)
    models_count = models.PositiveIntegerField(null=True, blank=True)
    last_checked_at = models.DateTimeField(null=True, blank=True)
    changed_at = models.DateTimeField(null=True, blank=True)
    next_probe_at = models.DateTimeField(default=timezone.now, db_index=True)

    class Meta:
        verbose_name_plural = "provider health"

    def __str__(self) -> str:
        return f"{self.provider.name}: {self.health_status}"


class HealthCheck(models.Model):
    """One probe of the last seven days."""

    provider = models.ForeignKey(Provider, on_delete=models.CASCADE, related_name="health_checks")
    at = models.DateTimeField(default=timezone.now, db_index=True)
    status = models.CharField(max_length=16, choices=Status)
    status_code = models.PositiveIntegerField(null=True, blank=True)
    latency_ms = models.FloatField(null=True, blank=True)
    detail = models.TextField(blank=True)

    class Meta:
        ordering: ClassVar = ["-at"]
        indexes: ClassVar = [models.Index(fields=["provider", "-at"], name="health_check_provider_at")]

    def __str__(self) -> str:
        return f"{self.provider.name} {self.status}"


class KeyUse(models.Model):
    """What a key has done so far, whether its provider refused it, and whether what is stored of it opens."""

    api_key = models.OneToOneField(ApiKey, on_delete=models.CASCADE, related_name="use", primary_key=True)
    requests_count = models.BigIntegerField(default=0)
    tokens_used = models.BigIntegerField(default=0)
    cost_nanodollars = models.BigIntegerField(default=0)
    last_used_at = models.DateTimeField(null=True, blank=True)
    rejected_at = models.DateTimeField(
        null=True, blank=True, help_text="When the provider last refused this key."
    )
    undecryptable_at = models.DateTimeField(
        null=True, blank=True, help_text="Since when the stored secret is known not to open."
    )

    def __str__(self) -> str:
        return f"{self.api_key}: {self.requests_count} requests"


class ProviderUse(models.Model):
    """What a provider has done so far, with all its keys; written by the drainer."""

    provider = models.OneToOneField(Provider, on_delete=models.CASCADE, related_name="use", primary_key=True)
    requests_count = models.BigIntegerField(default=0)
    tokens_used = models.BigIntegerField(default=0)
    cost_nanodollars = models.BigIntegerField(default=0)
    last_used_at = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "use of a provider"

    def __str__(self) -> str:
        return f"{self.provider.name}: {self.requests_count} requests"


class JobRun(models.Model):
    """A tick of a periodic job that someone has taken: two beats do no harm."""

    name = models.CharField(max_length=64)
    tick = models.BigIntegerField()
    started_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["name", "tick"], name="job_run_once_per_tick")
        ]

    def __str__(self) -> str:
        return f"{self.name} {self.tick}"
