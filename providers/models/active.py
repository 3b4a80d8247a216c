"""The provider in use for each purpose, and its fallbacks."""

from __future__ import annotations

from typing import ClassVar

from django.core.exceptions import ValidationError
from django.db import models

from audit.changes import Identity
from providers.models.provider import ApiKey, Managed, Provider, Versioned


class Purpose(models.TextChoices):
    CHAT = "chat", "Chat"
    EMBEDDINGS = "embeddings", "Embeddings"
    RERANKING = "reranking", "Reranking"


class ActiveProvider(Managed, Versioned):
    """One purpose. Its targets, in order, are the chosen one (position 0) and the fallbacks."""

    purpose = models.CharField(max_length=16, choices=Purpose, unique=True)

    class Meta:
        ordering: ClassVar = ["id"]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=models.Q(purpose__in=Purpose.values), name="active_purpose_is_known"
            )
        ]

    def __str__(self) -> str:
        return self.get_purpose_display()

    def audit_identity(self) -> Identity:
        return Identity("active_provider", self.purpose, str(self), "active", verb="set")


class ActiveTarget(models.Model):
    """A provider, or one key of it, at a position."""

    active = models.ForeignKey(ActiveProvider, on_delete=models.CASCADE, related_name="targets")
    position = models.PositiveSmallIntegerField()
    provider = models.ForeignKey(Provider, on_delete=models.PROTECT, related_name="active_targets")
    api_key = models.ForeignKey(
        ApiKey,
        on_delete=models.PROTECT,
        null=True,
        blank=True,
        related_name="active_targets",
        verbose_name="API key",
        help_text="Empty: all keys of the provider.",
    )
    model = models.CharField(
        max_length=255, blank=True, help_text="Empty: the model asked for, else the first."
    )

    class Meta:
        ordering: ClassVar = ["active", "position"]
        constraints: ClassVar = [
            models.UniqueConstraint(fields=["active", "position"], name="active_position_is_unique"),
        ]

    def __str__(self) -> str:
        return f"{self.provider}{f' ({self.model})' if self.model else ''}"

    def clean(self) -> None:
        if self.api_key_id and self.api_key is not None and self.api_key.provider_id != self.provider_id:
            raise ValidationError({"api_key": "This key belongs to another provider."})

    def audit_identity(self) -> Identity:
        return Identity(
            "active_provider",
            self.active.purpose,
            str(self.active),
            "active",
            verb="set",
            prefix=f"targets.{self.position}.",
        )
