"""What keys and providers have done so far, added up from usage records as they are inserted: the sums that lists show.

It runs in the transaction of the insert, so each record is counted when it is there, and once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from django.db import models
from django.db.models import Case, F, Q, Value, When

from providers.models import ApiKey, KeyUse, Provider, ProviderUse
from proxy.models import GatewayKey, GatewayKeyUse
from proxy.usage_rows import Row

MOST = 2**45
"""What one attempt can add: a provider may tell any number, and the sums are 64 bits wide."""

LAST_USED_EVERY = timedelta(minutes=1)
"""How often the mark of the last use moves at the most: nobody needs it finer, and whoever watches the column has peace."""


@dataclass(slots=True)
class Sum:
    """Of one key or provider. cost: nano-dollars, of the attempts whose price is known."""

    last_used_at: datetime
    requests: int = 0
    tokens: int = 0
    cost: int = 0


def count(rows: Iterable[Row]) -> None:
    """Add new usage rows to the sums of their keys and providers. What was deleted meanwhile has none."""
    api_keys: dict[int, Sum] = {}
    providers: dict[int, Sum] = {}
    gateway_keys: dict[int, Sum] = {}
    for row in rows:
        # A request that went to two providers is two attempts of one request of the gateway key.
        _add(api_keys, row["api_key_id"], row, 1)
        _add(providers, row["provider_id"], row, 1)
        _add(gateway_keys, row["gateway_key_id"], row, int(row["attempt"] == 1))
    _store(ApiKey, KeyUse, api_keys)
    _store(Provider, ProviderUse, providers)
    _store(GatewayKey, GatewayKeyUse, gateway_keys)


def _add(sums: dict[int, Sum], pk: int | None, row: Row, requests: int) -> None:
    if pk is None:
        return
    one = sums.setdefault(pk, Sum(row["created_at"]))
    one.last_used_at = max(one.last_used_at, row["created_at"])
    one.requests += requests
    one.tokens += min(row["prompt_tokens"] + row["completion_tokens"], MOST)
    one.cost += min(row["cost_nanodollars"] or 0, MOST)


def _store(owners: type[models.Model], uses: type[models.Model], sums: dict[int, Sum]) -> None:
    # In order, so that two drainers never wait for each other.
    for pk, one in sorted(sums.items()):
        old = Q(last_used_at=None) | Q(last_used_at__lte=one.last_used_at - LAST_USED_EVERY)
        last = Value(one.last_used_at, models.DateTimeField())
        changed: dict[str, Any] = {
            "requests_count": F("requests_count") + one.requests,
            "tokens_used": F("tokens_used") + one.tokens,
            "cost_nanodollars": F("cost_nanodollars") + one.cost,
            "last_used_at": Case(When(old, then=last), default=F("last_used_at")),
        }
        row = uses._default_manager.filter(pk=pk)
        if not row.update(**changed) and owners._default_manager.filter(pk=pk).exists():
            uses._default_manager.get_or_create(pk=pk)
            row.update(**changed)
