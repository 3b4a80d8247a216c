"""What all keys of a user or a team may do together."""

from __future__ import annotations

from typing import ClassVar

from django.conf import settings
from django.contrib.auth.models import Group
from django.db import models

from audit.changes import Identity
from providers.models.limited import Limited
from providers.models.provider import Versioned
from proxy.owners import Owned, not_a_role, text_of


class OwnerLimits(Owned, Limited, Versioned):
    """Limits that the keys of one user or of one team share, beside those that each key has."""

    owner = models.OneToOneField(
        settings.AUTH_USER_MODEL,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="owner_limits",
        verbose_name="user",
    )
    team = models.OneToOneField(
        Group,
        on_delete=models.CASCADE,
        null=True,
        blank=True,
        related_name="owner_limits",
        limit_choices_to=not_a_role,
    )

    class Meta:
        verbose_name = "limits of an owner"
        verbose_name_plural = "limits of owners"
        ordering: ClassVar = ["id"]
        constraints: ClassVar = [
            models.CheckConstraint(
                condition=models.Q(owner__isnull=True, team__isnull=False)
                | models.Q(owner__isnull=False, team__isnull=True),
                name="owner_limits_have_one_owner",
                violation_error_message="Choose a user or a team, and not both.",
            )
        ]

    def __str__(self) -> str:
        return text_of(self.holder)

    def audit_identity(self) -> Identity:
        return Identity("owner_limits", str(self.pk), str(self), "owner_limits")
