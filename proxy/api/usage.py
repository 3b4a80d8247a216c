"""Usage: records, one by one, and what they come to. Only read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import chain
from typing import Any, ClassVar

from django.db.models import F, Min
from django.db.models.expressions import OrderBy
from django.db.models.query import QuerySet
from django.http.response import HttpResponseBase
from django.utils.dateparse import parse_date
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api import LongPages
from audit.api_filters import YEARS
from audit.api_views import Door, KnownFields
from proxy import exports, reports
from proxy.models import UsageHour, UsageRecord
from proxy.models.usage import UsageStatus

FILTERS = ("gateway_key", "owner", "provider", "model", "status")
ORDERS = ("created_at", "cost_usd", "total_tokens", "duration_ms", "ttft_ms")
MOST_LINES = 10_000
"""Lines of a summary in one answer."""
MOST_LINES_AT_ONCE = 50_000
"""Lines of one hour or day of a CSV, which is held in memory."""


@extend_schema_field(OpenApiTypes.DATETIME)
class MomentField(serializers.DateTimeField):
    """A time with its offset, or a date; UTC where none is named."""

    def to_internal_value(self, value: Any) -> datetime:
        day = self._day(value)
        found: datetime = super().to_internal_value(f"{day}T00:00:00Z" if day else value)
        if found.year not in YEARS:
            self.fail("overflow")
        return found.astimezone(UTC)

    @staticmethod
    def _day(value: Any) -> Any:
        try:
            return parse_date(value) if isinstance(value, str) and "T" not in value else None
        except ValueError:
            return None


@extend_schema_field({"type": "array", "items": {"type": "string", "enum": list(reports.GROUPS)}})
class GroupsField(serializers.Field[Any, Any, Any, Any]):
    """Names of reports.GROUPS, separated by commas."""

    def to_internal_value(self, data: Any) -> list[str]:
        names = [name.strip() for name in str(data).split(",") if name.strip()]
        if wrong := [name[:100] for name in names if name not in reports.GROUPS]:
            raise serializers.ValidationError(
                f"{', '.join(wrong[:5])}: write some of {', '.join(reports.GROUPS)}, separated by commas."
            )
        return names

    def to_representation(self, value: Any) -> Any:
        return value


class UsageQuery(KnownFields):
    """What both paths may be asked. A gateway key or a provider is named by its id or its name (slug)."""

    gateway_key = serializers.CharField(required=False, max_length=100, help_text="Its id or its name.")
    owner = serializers.CharField(required=False, max_length=150)
    provider = serializers.CharField(required=False, max_length=100, help_text="Its id or its slug.")
    model = serializers.CharField(
        required=False, max_length=255, help_text="As the provider was asked for it."
    )
    status = serializers.ChoiceField(UsageStatus.choices, required=False)
    since = MomentField(
        required=False, help_text="From then on. A date, or a time (UTC where it has no offset)."
    )
    until = MomentField(required=False, help_text="Before then.")
    format = serializers.ChoiceField([("json", "JSON"), ("csv", "CSV")], default="json")

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        if values.get("since") and values.get("until") and values["since"] >= values["until"]:
            raise serializers.ValidationError({"until": ["This is not after `since`."]})
        return values


class RecordsQuery(UsageQuery):
    ordering = serializers.ChoiceField(
        [f"{sign}{name}" for name in ORDERS for sign in ("", "-")],
        default="-created_at",
        help_text="With a minus the largest first. A CSV is always the newest first.",
    )
    page = serializers.CharField(required=False)
    page_size = serializers.CharField(required=False)


class SummaryQuery(UsageQuery):
    group_by = GroupsField(required=False, help_text="What to tell apart, separated by commas.")
    bucket = serializers.ChoiceField(
        [(name, name) for name in reports.BUCKETS],
        required=False,
        help_text="A line for each hour or day, UTC.",
    )


class UsageSerializer(serializers.ModelSerializer[UsageRecord]):
    api_key = serializers.IntegerField(
        source="api_key_id", allow_null=True, help_text="The id of an API key."
    )
    cost_usd = serializers.SerializerMethodField(help_text="A decimal number; null while no price is known.")
    total_tokens = serializers.IntegerField()
    # Written out, because the largest number of a column is another one on each database, and the schema is one.
    attempt = serializers.IntegerField(min_value=1, max_value=32767)

    class Meta:
        model = UsageRecord
        fields: ClassVar[Any] = (
            "id", "request_id", "attempt", "created_at", "gateway_key", "owner", "route", "provider", "api_key",
            "requested_model", "model", "purpose", "status", "error_code", "prompt_tokens", "completion_tokens", "total_tokens",
            "cached_tokens", "cache_write_tokens", "reasoning_tokens", "tokens_source", "cost_usd", "price_id", "ttft_ms",
            "duration_ms", "bytes_out", "stream", "client_disconnected", "trace",
        )  # fmt: skip

    def get_cost_usd(self, record: UsageRecord) -> str | None:
        return None if record.cost_nanodollars is None else reports.dollars(record.cost_nanodollars)


class LineSerializer(serializers.Serializer[Any]):
    """A line of a summary: `bucket`, and what it is grouped by, where they were asked for; then the sums."""

    bucket = serializers.DateTimeField(required=False)
    key_id = serializers.IntegerField(required=False, allow_null=True)
    key = serializers.CharField(required=False)
    owner = serializers.CharField(required=False)
    provider_id = serializers.IntegerField(required=False, allow_null=True)
    provider = serializers.CharField(required=False)
    api_key = serializers.IntegerField(required=False, allow_null=True)
    model = serializers.CharField(required=False)
    route = serializers.CharField(required=False)
    purpose = serializers.CharField(required=False)
    status = serializers.CharField(required=False)
    requests = serializers.IntegerField(help_text="Requests, each counted once however often it was tried.")
    attempts = serializers.IntegerField()
    errors = serializers.IntegerField(  # type: ignore[assignment]  # the name of a column, which is also one of DRF's
        help_text="Attempts that failed; a caller who left is none."
    )
    prompt_tokens = serializers.IntegerField()
    completion_tokens = serializers.IntegerField()
    total_tokens = serializers.IntegerField()
    cached_tokens = serializers.IntegerField()
    cache_write_tokens = serializers.IntegerField()
    reasoning_tokens = serializers.IntegerField()
    cost_usd = serializers.CharField(help_text="A decimal number: of the attempts whose price is known.")
    unpriced = serializers.IntegerField(help_text="Attempts whose price is not known.")
    estimated = serializers.IntegerField(help_text="Attempts whose tokens are our own estimate.")
    mean_duration_ms = serializers.IntegerField(allow_null=True)
    mean_ttft_ms = serializers.IntegerField(allow_null=True)


class SummarySerializer(serializers.Serializer[Any]):
    since = serializers.DateTimeField(help_text="What was asked for, moved back to a whole hour.")
    until = serializers.DateTimeField(help_text="What was asked for, moved on to a whole hour; not included.")
    time_zone = serializers.CharField(help_text="Of hours and days: UTC.")
    bucket = serializers.CharField(allow_null=True)
    group_by = serializers.ListField(child=serializers.CharField())
    results = LineSerializer(many=True)
    totals = LineSerializer()


JSON = "application/json"
CSV = {(200, "text/csv"): OpenApiTypes.STR}


class Usage(Door):
    """One record for each attempt at a provider. A member sees those of his own keys."""

    resource = "usage"
    words: ClassVar = {"summary": "read"}
    serializer_class = UsageSerializer
    queryset = UsageRecord.objects.all()
    pagination_class = LongPages
    filter_backends = ()
    lookup_value_regex = r"[0-9a-fA-F]{8}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{4}-?[0-9a-fA-F]{12}"

    def get_queryset(self) -> QuerySet[UsageRecord]:
        return reports.seen_by(self.request.user, super().get_queryset())

    @extend_schema(parameters=[RecordsQuery], responses={(200, JSON): UsageSerializer(many=True), **CSV})
    def list(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """Records, the newest first. `count` is exact up to 100,000. With `format=csv` all of them, without `trace`."""
        self.wanted = wanted = _read(RecordsQuery, request)
        rows = reports.narrowed(self.get_queryset(), {name: wanted.get(name) for name in FILTERS})
        if since := wanted.get("since"):
            rows = rows.filter(created_at__gte=since)
        if until := wanted.get("until"):
            rows = rows.filter(created_at__lt=until)
        if wanted["format"] == "csv":
            pieces = map(_cells, exports.newest_first(rows))
            return exports.download(request._request, "usage.csv", columns=CELLS, pieces=pieces)
        page = self.paginate_queryset(_ordered(rows, wanted["ordering"]))
        return self.get_paginated_response(self.get_serializer(page, many=True).data)

    def about_as_many(self) -> int:
        """What `count` says when there are too many records to count."""
        oldest = UsageRecord.objects.aggregate(at=Min("created_at"))["at"]
        since, until = self.wanted.get("since"), self.wanted.get("until")
        return reports.about_as_many(self._sums(self.wanted), since=since, until=until, oldest=oldest)

    def retrieve(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return Response(self.get_serializer(self.get_object()).data)

    @extend_schema(parameters=[SummaryQuery], responses={(200, JSON): SummarySerializer, **CSV})
    @action(detail=False, methods=["get"], pagination_class=None)
    def summary(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponseBase:
        """What the records of whole hours (UTC) come to; of the last thirty days if nothing is said."""
        wanted = _read(SummaryQuery, request)
        report = reports.asked(
            since=wanted.get("since"),
            until=wanted.get("until"),
            group_by=wanted.get("group_by", ()),
            bucket=wanted.get("bucket"),
        )
        sums = self._sums(wanted)
        try:
            if wanted["format"] == "csv":
                pieces = _lines(reports.line_by_line(sums, report, most=MOST_LINES_AT_ONCE), report.names)
                return exports.download(
                    request._request, "usage-summary.csv", columns=report.names, pieces=pieces
                )
            found, totals = reports.lines_and_totals(sums, report, most=MOST_LINES)
        except reports.TooManyLines as error:
            message = f"More than {MOST_LINES:,} lines: ask for a shorter period, fewer groups, or CSV."
            raise serializers.ValidationError({"group_by": [message]}) from error
        answer = {
            "since": report.since,
            "until": report.until,
            "time_zone": "UTC",
            "bucket": report.bucket,
            "group_by": report.group_by,
            "results": found,
            "totals": totals,
        }
        return Response(answer)

    def _sums(self, wanted: Mapping[str, Any]) -> QuerySet[UsageHour]:
        sums = reports.seen_by(self.request.user, UsageHour.objects.all())
        return reports.narrowed(sums, {name: wanted.get(name) for name in FILTERS})


def _read(query: type[UsageQuery], request: Request) -> dict[str, Any]:
    """What was asked for. Whatever is unknown, wrong or said twice is 400."""
    given = request.query_params
    form = query(data={name: ",".join(given.getlist(name)) for name in given})
    form.is_valid(raise_exception=True)
    found: dict[str, Any] = form.validated_data
    return found


def _ordered(rows: QuerySet[UsageRecord], ordering: str) -> QuerySet[UsageRecord]:
    name, down = ordering.removeprefix("-"), ordering.startswith("-")
    if name == "created_at":
        return rows.order_by(ordering, "-id" if down else "id")
    value: Any = F("cost_nanodollars") if name == "cost_usd" else F(name)
    if name == "total_tokens":
        value = F("prompt_tokens") + F("completion_tokens")
    return rows.order_by(OrderBy(value, descending=down, nulls_last=True), "-created_at", "-id")


CELLS = tuple(name for name in UsageSerializer.Meta.fields if name != "trace")


def _cells(records: Iterable[UsageRecord]) -> list[list[object]]:
    shown: Any = UsageSerializer(list(records), many=True).data
    return [[row[name] for name in CELLS] for row in shown]


def _lines(pieces: Iterator[list[reports.Line]], names: Iterable[str]) -> Iterator[list[list[object]]]:
    """Lines as rows of cells. The first piece is read now, before the answer begins, so that too many lines are an error."""
    first = next(pieces, [])
    return ([[line[name] for name in names] for line in piece] for piece in chain([first], pieces))
