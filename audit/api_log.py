"""The audit log through the API: read, searched and verified, never written."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models.query import QuerySet
from django_filters import rest_framework as filters
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api import LongPages
from audit.api_filters import check_year
from audit.api_views import Door
from audit.models import Entry, Head
from audit.search import about_fingerprint
from audit.verify import missing_triggers, verify

SAMPLE = 10_000
"""The newest entries, from whose share of matches the number of all is estimated when there are too many to count."""


class EntrySerializer(serializers.ModelSerializer[Entry]):
    id = serializers.IntegerField(
        source="seq", help_text="Also the version of the configuration that this made."
    )
    changes = serializers.DictField(
        child=serializers.ListField(min_length=2, max_length=2),
        help_text='{"field": [before, after]}. Secrets are dots; `fingerprint` is a keyed hash of one.',
    )

    class Meta:
        model = Entry
        fields: ClassVar[Any] = (
            "id", "timestamp", "action", "entity_type", "entity_id", "entity_name", "user_id", "username", "via", "ip",
            "request_id", "changes", "hash",
        )  # fmt: skip


class VerificationSerializer(serializers.Serializer[Any]):
    ok = serializers.BooleanField()
    entries = serializers.IntegerField(help_text="Entries that are whole.")
    seq = serializers.IntegerField(help_text="The head: the number of the last entry.")
    hash = serializers.CharField()
    problems = serializers.ListField(
        child=serializers.CharField(), help_text="A sentence each; at most 100 of the chain."
    )


class EntryFilter(filters.FilterSet):  # type: ignore[misc]
    actor = filters.CharFilter(field_name="username", help_text="A user name.")
    since = filters.IsoDateTimeFilter(
        field_name="timestamp", lookup_expr="gte", validators=[check_year], help_text="From then on."
    )
    until = filters.IsoDateTimeFilter(
        field_name="timestamp", lookup_expr="lt", validators=[check_year], help_text="Before then."
    )
    fingerprint = filters.CharFilter(
        method="with_fingerprint",
        help_text="Of a provider's key, as POST api-keys/fingerprint tells it: where it was set or replaced.",
    )

    class Meta:
        model = Entry
        fields: ClassVar = ["action", "entity_type", "entity_id", "via", "request_id"]

    def with_fingerprint(self, rows: QuerySet[Entry], name: str, value: str) -> QuerySet[Entry]:
        return rows.filter(about_fingerprint(value))


class AuditLog(Door):
    """Who changed what. The newest first."""

    resource = "audit"
    words: ClassVar = {"verify": "read"}
    serializer_class = EntrySerializer
    queryset = Entry.objects.all()
    pagination_class = LongPages
    filterset_class = EntryFilter
    search_fields = ("username", "entity_name", "action", "=request_id")
    ordering_fields = ("timestamp", "seq")
    lookup_value_regex = r"[0-9]{1,18}"

    def filter_queryset(self, queryset: QuerySet[Any]) -> QuerySet[Any]:
        self.asked = super().filter_queryset(queryset)
        return self.asked

    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Entries, the newest first. `count` is exact up to 100,000."""
        page = self.paginate_queryset(self.filter_queryset(self.get_queryset()))
        return self.get_paginated_response(self.get_serializer(page, many=True).data)

    def about_as_many(self) -> int:
        """What `count` says when there are too many entries to count."""
        last = Head.objects.values_list("seq", flat=True).first() or 0
        found = self.asked.order_by().filter(seq__gt=last - SAMPLE).count()
        return found * last // min(last, SAMPLE)

    def retrieve(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return Response(self.get_serializer(self.get_object()).data)

    @extend_schema(responses=VerificationSerializer)
    @action(detail=False, methods=["get"], pagination_class=None, filter_backends=[])
    def verify(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Whether no entry was edited, removed, put in, moved or cut off. Reads the whole log; 200 whatever is found."""
        report = verify()
        problems = [*report.problems, *(f"the trigger {name} is missing" for name in missing_triggers())]
        return Response(
            {
                "ok": not problems,
                "entries": report.entries,
                "seq": report.seq,
                "hash": report.hash,
                "problems": problems,
            }
        )
