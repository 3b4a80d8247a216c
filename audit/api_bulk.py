"""The same change of several rows: all of them, or none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from drf_spectacular.utils import extend_schema
from rest_framework import exceptions, serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit import roles
from audit.api_views import KnownFields, Rows

if TYPE_CHECKING:
    Base = Rows
else:
    Base = object

MAX_ROWS = 500
"""The log's head is locked for as long as it takes."""


class BulkSerializer(KnownFields):
    action = serializers.ChoiceField(("enable", "disable", "delete"))
    ids = serializers.ListField(
        child=serializers.IntegerField(min_value=1, max_value=2**63 - 1),
        min_length=1,
        max_length=MAX_ROWS,
        help_text=f"At most {MAX_ROWS}.",
    )


class BulkResultSerializer(serializers.Serializer[Any]):
    action = serializers.ChoiceField(("enable", "disable", "delete"))
    ids = serializers.ListField(child=serializers.IntegerField())


class Bulk(Base):
    """`POST .../bulk` enables, disables or deletes rows by their ids. switch: the column that says whether one is on."""

    switch: ClassVar = "enabled"

    @extend_schema(request=BulkSerializer, responses=BulkResultSerializer)
    @action(detail=False, methods=["post"], pagination_class=None, filter_backends=[])
    def bulk(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Enable, disable or delete several at once. When one of them cannot be, none is changed."""
        form = BulkSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        wanted, ids = form.validated_data["action"], list(dict.fromkeys(form.validated_data["ids"]))
        if not roles.may(request.user, self.resource, "delete" if wanted == "delete" else "change"):
            raise exceptions.PermissionDenied
        with self.changing():
            rows = self.get_queryset().in_bulk(ids)
            if missing := [str(id) for id in ids if id not in rows]:
                raise exceptions.ValidationError({"ids": [f"There is no {', '.join(missing[:20])}."]})
            for id in ids:
                self._apply(wanted, rows[id])
        return Response({"action": wanted, "ids": ids})

    def _apply(self, wanted: str, row: Any) -> None:
        if wanted == "delete":
            self.remove(row)
            return
        serializer = self.get_serializer(row, data={self.switch: wanted == "enable"}, partial=True)
        serializer.is_valid(raise_exception=True)
        serializer.save()
