"""Filters of the list of usage. None of them asks the records what there is: that would read millions of them."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from django.db.models import QuerySet
from django.http import HttpRequest
from unfold.contrib.filters.admin import RangeDateFilter, TextFilter

from proxy import reports
from proxy.models import UsageRecord


class Named(TextFilter):  # type: ignore[misc]
    """Exactly this value, as the API's filter of the same name understands it."""

    def queryset(self, request: HttpRequest, queryset: QuerySet[UsageRecord]) -> QuerySet[UsageRecord]:
        return reports.narrowed(
            queryset, {self.parameter_name: (self.value() or "").strip().replace("\0", "")}
        )


class GatewayKeyFilter(Named):
    title, parameter_name = "gateway key (name or id)", "gateway_key"


class ProviderFilter(Named):
    title, parameter_name = "provider (slug or id)", "provider"


class ModelFilter(Named):
    title, parameter_name = "model", "model"


class OwnerFilter(Named):
    title, parameter_name = "owner", "owner"


class Days(RangeDateFilter):  # type: ignore[misc]
    """From the beginning of one day to the end of another, UTC."""

    def queryset(self, request: HttpRequest, queryset: QuerySet[Any]) -> QuerySet[Any]:
        first, last = (_day(self.used_parameters.get(name)) for name in self.expected_parameters())
        if first is not None:
            queryset = queryset.filter(created_at__gte=first)
        if last is not None:
            queryset = queryset.filter(created_at__lt=last + timedelta(days=1))
        return queryset


def _day(text: Any) -> datetime | None:
    """The beginning of a day; None for what is none."""
    try:
        day = date.fromisoformat(str(text or "").strip())
    except ValueError:
        return None
    return datetime.combine(day, time(), UTC) if 1970 <= day.year < 9999 else None
