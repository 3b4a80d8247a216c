"""What an application holds to call us."""

from __future__ import annotations

import ipaddress
from typing import Any, ClassVar

from django.conf import settings
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.utils import timezone

from audit.changes import Identity
from providers.fields import SealedField
from providers.models.limited import Limited
from providers.models.provider import Managed, Versioned
from proxy.owners import Owned, not_a_role, owned_by

MAX_CACHE_SECONDS = 7 * 24 * 3600


def check_models(names: Any) -> None:
    if not isinstance(names, list) or not all(
        isinstance(name, str) and 0 < len(name) <= 255 for name in names
    ):
        raise ValidationError("Write a list of model names; * stands for anything.")


def check_networks(networks: Any) -> None:
    # A number is a network for Python, and none for those who read what is stored.
    if not isinstance(networks, list) or not all(isinstance(network, str) for network in networks):
        raise ValidationError("Write a list of networks, each as text.")
    for network in networks:
        try:
            ipaddress.ip_network(network)
        except ValueError as error:
            raise ValidationError(f"{network[:64]!r} is not a network like 10.0.0.0/8.") from error


class GatewayKey(Owned, Limited, Managed, Versioned):
    """A key that we issue. Its secret is kept only as an HMAC under a numbered pepper and was shown once.

    owner, team: whose it is, a user's or a team's or nobody's; it is deleted with them.
    previous_*: the secret before the last rotation, good until `previous_until`.
    resume_streams: whether a stream that broke is gone on with; None is as the route or the active provider says.
    record_text: whether what is said is kept, sealed. cache_seconds: for how long answers are; None is not at all.
    cache_emptied_at: answers of its owner from before this are not given any more. All keys of an owner know it, so that it
    outlives each of them.
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
    team = models.ForeignKey(
        Group,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="gateway_keys",
        limit_choices_to=not_a_role,
    )
    enabled = models.BooleanField(default=True)
    revoked_at = models.DateTimeField(null=True, editable=False)
    expires_at = models.DateTimeField(null=True, blank=True)
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

    record_text = models.BooleanField(
        "keep what is said",
        default=False,
        help_text="Keep the beginning of each request and answer, sealed, for administrators to read.",
    )
    cache_seconds = models.PositiveIntegerField(
        "keep answers for (seconds)",
        null=True,
        blank=True,
        validators=[MinValueValidator(1), MaxValueValidator(MAX_CACHE_SECONDS)],
        help_text="For how long the same question at temperature 0 gets the same answer, without asking a provider. Null: never.",
    )
    cache_emptied_at = models.DateTimeField(null=True, editable=False)

    class Meta:
        ordering: ClassVar = ["name", "id"]
        constraints: ClassVar = [
            models.CheckConstraint(condition=~models.Q(hmac=""), name="gateway_key_has_an_hmac"),
            models.UniqueConstraint(fields=["name"], name="gateway_key_name_is_unique"),
            models.CheckConstraint(
                condition=models.Q(owner__isnull=True) | models.Q(team__isnull=True),
                name="gateway_key_has_one_owner",
                violation_error_message="A key belongs to a user or to a team, not to both.",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def save(self, *args: Any, **kwargs: Any) -> None:
        """What was emptied stays so with a key that its owner gets later, or again."""
        newest = self.sharing_a_cache().aggregate(at=models.Max("cache_emptied_at"))["at"]
        self.cache_emptied_at = max(filter(None, (self.cache_emptied_at, newest)), default=None)
        super().save(*args, **kwargs)

    def sharing_a_cache(self) -> models.QuerySet[GatewayKey]:
        """The keys that get the same kept answers: those of a person or a team, else nobody but the key itself."""
        if self.team_id is not None:
            return GatewayKey.objects.filter(team=self.team_id)
        if self.owner_id is not None:
            return GatewayKey.objects.filter(owner=self.owner_id)
        return GatewayKey.objects.filter(pk=self.pk)

    @property
    def prefix(self) -> str:
        """What may be shown of the key, and identifies it."""
        return f"pen_live_{self.key_id}"

    @property
    def usable(self) -> bool:
        expired = self.expires_at is not None and self.expires_at <= timezone.now()
        owner_gone = self.owner is not None and not self.owner.is_active
        return self.enabled and self.revoked_at is None and not expired and not owner_gone

    @property
    def budget_amount(self) -> int | None:
        """Nano-dollars; None: the key has no budget of its own."""
        budget = getattr(self, "budget", None)
        return None if budget is None else budget.amount

    @property
    def budget_window(self) -> str | None:
        budget = getattr(self, "budget", None)
        return None if budget is None else budget.window

    @property
    def budget_spent(self) -> int | None:
        """Of its own budget in the present window, in nano-dollars."""
        budget = getattr(self, "budget", None)
        return None if budget is None else budget.account.spent

    def audit_identity(self) -> Identity:
        return Identity("gateway_key", str(self.pk), self.name, "gateway_key")


def keys_of(user: Any) -> models.QuerySet[GatewayKey]:
    """The keys that are this person's or his teams': whose they are, and whose usage, is decided here."""
    return GatewayKey.objects.filter(owned_by(user))


class GatewayKeyUse(models.Model):
    """What a key has done so far; written by the drainer."""

    gateway_key = models.OneToOneField(
        GatewayKey, on_delete=models.CASCADE, related_name="use", primary_key=True
    )
    last_used_at = models.DateTimeField(null=True, blank=True)
    requests_count = models.BigIntegerField(default=0)
    tokens_used = models.BigIntegerField(default=0)
    cost_nanodollars = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return f"{self.gateway_key}: {self.last_used_at}"
