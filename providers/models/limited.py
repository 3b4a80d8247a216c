"""The columns of whatever has limits of its own."""

from __future__ import annotations

from typing import Any

from django.core.validators import MinValueValidator
from django.db import models

from providers.wire import Quota

LIMIT: dict[str, Any] = {"null": True, "blank": True, "validators": [MinValueValidator(1)]}
LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrency")


class Limited(models.Model):
    """Requests and tokens a minute, and requests at the same time; null is no limit."""

    requests_per_minute = models.PositiveIntegerField(**LIMIT)
    tokens_per_minute = models.PositiveIntegerField(**LIMIT)
    max_concurrency = models.PositiveIntegerField(**LIMIT)

    class Meta:
        abstract = True

    def quota(self) -> Quota | None:
        """The same as requests need it; None where nothing is limited."""
        quota = Quota(self.requests_per_minute, self.tokens_per_minute, self.max_concurrency)
        return None if quota == Quota() else quota
