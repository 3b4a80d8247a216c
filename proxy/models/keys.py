"""What an application holds to call us."""

from __future__ import annotations

import ipaddress
from typing import Any, ClassVar

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.validators import MinValueValidator
from django.db import models
from django.utils import timezone

from audit.changes import Identity
from providers.fields import SealedField
from providers.models.provider import Managed, Versioned

LIMIT: dict[str, Any] = {"null": True, "blank": True, "validators": [MinValueValidator(1)]}


def check_models(names: Any) -> None:
    if not isinstance(names, list) or not all(
        isinstance(name, str) and 0 < len(name) <= 255 for name in names
    ):
        raise ValidationError("Write a list of model names; * stands for anything.")


def check_networks(networks: Any) -> None:
    if not isinstance(networks, list):
        raise ValidationError("Write a list of networks.")
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ValidationError(f"{str(network)[:64]!r} is not a network like 10.0.0.0/8.") from error


class GatewayKey(Managed, Versioned):
    """A key that we issue. Its secret is kept only as an HMAC under a numbered pepper and was shown once.

    previous_*: the secret before the last rotation, good until `previous_until`.
    resume_streams: whether a stream that broke is gone on with; None is as the route or the active provider says.
    """

    key_id = models.CharField(max_length=10, unique=True, editable=False)
    name = models.CharField(max_length=100)
    hmac = SealedField(editable=False)
    pepper = models.PositiveIntegerField(editable=False)
    last4 = models.CharField(max_length=4, editable=False)
    previous_hmac = SealedField(blank=True, default="", editable=False)
    previous_pepper = models.PositiveIntegerField(null=True, editable=False)
    previous_until = models.DateTimeField(null=True, editable=False)
    owner = models.ForeignKey(
        settings.AUTH_USER_MODEL, on_delete=models.CASCADE, null=True, blank=True, related_name="gateway_keys"
    )
    enabled = models.BooleanField(default=True)
    revoked_at = models.DateTimeField(null=True, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
    requests_per_minute = models.PositiveIntegerField(**LIMIT)
    tokens_per_minute = models.PositiveIntegerField(**LIMIT)
    max_concurrency = models.PositiveIntegerField(**LIMIT)
    allowed_models = models.JSONField(
        default=list, blank=True, validators=[check_models], help_text="Empty: all. * stands for anything."
    )
    allowed_networks = models.JSONField(
        default=list, blank=True, validators=[check_networks], help_text="Empty: from anywhere."
    )
    resume_streams = models.BooleanField(
        "resume broken streams",
        null=True,
        blank=True,
        help_text="Whether a stream that broke is gone on with. Null: as the route or the active provider says.",
    )

    class Meta:
        ordering: ClassVar = ["name", "id"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=~models.Q(hmac=""), name="gateway_key_has_an_hmac"),
            models.UniqueConstraint(fields=["name"], name="gateway_key_name_is_unique"),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def prefix(self) -> str:
        """What may be shown of the key, and identifies it."""
        return f"pen_live_{self.key_id}"

    @property
    def usable(self) -> bool:
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        owner_gone = self.owner is not None and not self.owner.is_active
        return self.enabled and self.revoked_at is None and not expired and not owner_gone

    def audit_identity(self) -> Identity:
        return Identity("gateway_key", str(self.pk), self.name, "gateway_key")


class GatewayKeyUse(models.Model):
    """What a key has done so far; written by the drainer."""

    gateway_key = models.OneToOneField(
        GatewayKey, on_delete=models.CASCADE, related_name="use", primary_key=True
    )
    last_used_at = models.DateTimeField(null=True, blank=True)
    requests_count = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.gateway_key}: {self.last_used_at}"
