"""What a list may be asked. A question that is not understood is an error: an answer that leaves it out would mislead."""

from __future__ import annotations

from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from django.core.exceptions import ValidationError
from django.db.models import Model
from django.db.models.query import QuerySet
from django_filters.rest_framework import DjangoFilterBackend
from rest_framework import exceptions
from rest_framework.filters import BaseFilterBackend, OrderingFilter
from rest_framework.request import Request

if TYPE_CHECKING:
    # REST framework imports this module while it imports its views.
    from rest_framework.views import APIView

Row = TypeVar("Row", bound=Model)
COMMON = frozenset({"page", "page_size", "search", "ordering"})
MAX_UNKNOWN = 20
YEARS = range(1970, 3000)


def check_year(moment: datetime) -> None:
    """Far off, a time has no counterpart in UTC that could be compared."""
    if moment.year not in YEARS:
        raise ValidationError(f"Write a year from {YEARS[0]} to {YEARS[-1]}.")


class KnownParameters(BaseFilterBackend):
    """Refuses a list whose address has a parameter that neither the pages nor the list's filters know."""

    def filter_queryset(self, request: Request, queryset: QuerySet[Any], view: APIView) -> QuerySet[Any]:
        if getattr(view, "detail", None) is False:
            filters = DjangoFilterBackend().get_filterset_class(view, queryset)
            known = COMMON | set(getattr(filters, "base_filters", ()))
            unknown = islice((name for name in request.query_params if name not in known), MAX_UNKNOWN)
            if problems := {name[:100]: ["There is no such parameter."] for name in unknown}:
                raise exceptions.ValidationError(problems)
        return queryset


class KnownOrdering(OrderingFilter):
    """Names of `ordering_fields`, separated by commas, each with a minus for the other way round.

    Rows that are alike in them are ordered by their key, so that no page repeats what was on another.
    """

    def get_ordering(self, request: Request, queryset: QuerySet[Any], view: APIView) -> list[str] | None:
        ordering = super().get_ordering(request, queryset, view)
        return [*ordering, "pk"] if ordering else None

    def remove_invalid_fields(
        self, queryset: QuerySet[Any], fields: Any, view: APIView, request: Request
    ) -> list[str]:
        valid: list[str] = list(super().remove_invalid_fields(queryset, fields, view, request))
        if wrong := [str(field) for field in fields if field not in valid]:
            known = ", ".join(name for name, _ in self.get_valid_fields(queryset, view, {"request": request}))
            message = f"{', '.join(wrong)[:100]}: write some of {known}."
            raise exceptions.ValidationError({self.ordering_param: [message]})
        return valid
