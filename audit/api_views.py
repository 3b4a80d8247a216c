"""The base of the API's views: roles, one door for changes, row versions, and serializers that refuse what they do not know."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from typing import Any, ClassVar, Generic, TypeVar

from django.core.exceptions import ValidationError as DjangoValidationError
from django.db import models
from django.http import Http404
from rest_framework import exceptions, serializers, viewsets
from rest_framework.generics import get_object_or_404
from rest_framework.negotiation import BaseContentNegotiation
from rest_framework.permissions import BasePermission
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from audit import roles
from audit.api_errors import WHOLE, PreconditionFailed, ip_of, request_id_of
from audit.changes import Change, changes

Row = TypeVar("Row", bound=models.Model)

WORDS: Mapping[str, str] = {
    "list": "read",
    "retrieve": "read",
    "metadata": "read",
    "create": "add",
    "update": "change",
    "partial_update": "change",
    "destroy": "delete",
    "bulk": "change",
}
"""What REST framework's actions are called in the table of roles."""

UNKNOWN = "There is no such field."
MAX_UNKNOWN = 20
"""Unknown fields that an answer names; a body may have 200,000 of them."""
MAX_INTEGER = 2**31 - 1
TAG = re.compile(r'(?:W/)?"([^"]*)"')


class ByRole(BasePermission):
    """Allows what `audit.roles.TABLE` says of the view's resource and action, and nothing else."""

    def has_permission(self, request: Request, view: APIView) -> bool:
        if not request.user.is_authenticated:
            return False
        return roles.may(request.user, getattr(view, "resource", ""), word_of(view))


def word_of(view: APIView) -> str:
    """The view's action in the words of the table; a method that the view does not have is answered to readers only."""
    action = getattr(view, "action", None) or "metadata"
    words: Mapping[str, str] = getattr(view, "words", {})
    return words.get(action) or WORDS.get(action, "")


class OnlyJSON(BaseContentNegotiation):
    """There is one form of answer, whatever the caller would prefer."""

    def select_parser(self, request: Request, parsers: Any) -> Any:
        wanted = (request.content_type or "").partition(";")[0].strip().lower()
        return next((parser for parser in parsers if parser.media_type == wanted), None)

    def select_renderer(self, request: Request, renderers: Any, format_suffix: str | None = None) -> Any:
        return renderers[0], renderers[0].media_type


class Door(viewsets.GenericViewSet[Any]):
    """A view of a resource of the table. `words` names the table's word for actions of the view's own."""

    resource: ClassVar[str]
    words: ClassVar[Mapping[str, str]] = {}
    permission_classes = [ByRole]
    content_negotiation_class = OnlyJSON

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        """REST framework's order with throttling before permission, so that guessing costs tries as well."""
        self.format_kwarg = None
        renderer, media_type = self.perform_content_negotiation(request)
        request.accepted_renderer, request.accepted_media_type = renderer, media_type
        try:
            self.perform_authentication(request)
        except exceptions.AuthenticationFailed:
            self.check_throttles(request)
            raise
        self.check_throttles(request)
        self.check_permissions(request)

    def changing(self) -> AbstractContextManager[Change]:
        """The one door for changes, in the caller's name. No network inside."""
        return changes(
            actor=self.request.user,
            via="api",
            ip=ip_of(self.request),
            request_id=request_id_of(self.request),
        )

    def check_version(self, row: Any) -> None:
        """If-Match, when it is sent, names the version that the caller has seen (`"3"`). Call inside `changing`."""
        wanted = self.request.headers.get("If-Match", "").strip()
        if wanted and wanted != "*" and str(row.version) not in TAG.findall(wanted):
            raise PreconditionFailed

    def shown(self, row: Any, status: int = 200, **more: Any) -> Response:
        """The row as it is stored now, with its version as ETag."""
        row = get_object_or_404(self.get_queryset(), pk=row.pk)
        return Response({**self.get_serializer(row).data, **more}, status=status, headers=tag_of(row))


def tag_of(row: Any) -> dict[str, str]:
    return {"ETag": f'"{row.version}"'}


class KeptRows(Door):
    """List, create and read rows that stay as they were made, each new one recorded."""

    lookup_value_regex = r"[0-9]{1,18}"

    def list(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        page = self.paginate_queryset(self.filter_queryset(self.get_queryset()))
        return self.get_paginated_response(self.get_serializer(page, many=True).data)

    def retrieve(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        row = self.get_object()
        return Response(self.get_serializer(row).data, headers=tag_of(row))

    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        serializer = self.get_serializer(data=request.data)
        with self.changing():
            serializer.is_valid(raise_exception=True)
            row = serializer.save()
        return self.shown(row, 201)


class Rows(KeptRows):
    """List, create, read, update and delete rows, each change recorded and on the version that the caller has seen."""

    def update(self, request: Request, *args: Any, partial: bool = False, **kwargs: Any) -> Response:
        data = request.data
        with self.changing():
            row = self.get_object()
            self.check_version(row)
            serializer = self.get_serializer(row, data=data, partial=partial)
            serializer.is_valid(raise_exception=True)
            serializer.save()
        return self.shown(row)

    def partial_update(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        return self.update(request, *args, partial=True, **kwargs)

    def destroy(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        with self.changing():
            row = self.get_object()
            self.check_version(row)
            self.remove(row)
        return Response(status=204)

    def remove(self, row: Any) -> None:
        """Delete a row, unless something goes with it that the caller may not delete."""
        if not roles.may_delete(self.request.user, row):
            raise exceptions.PermissionDenied("This would delete what you may not delete with it.")
        row.delete()


def unknown_fields(names: Iterable[str]) -> dict[str, list[str]]:
    """The first of them, as what is told of an invalid body."""
    return {name[:100]: [UNKNOWN] for name in islice(names, MAX_UNKNOWN)}


class KnownFields(serializers.Serializer[Any]):
    """A body that is not a row: unknown fields are an error, and read-only ones, from an answer sent back, are ignored."""

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping) and (unknown := data.keys() - self.fields.keys()):
            raise serializers.ValidationError(unknown_fields(unknown))
        return super().to_internal_value(data)


class StrictSerializer(serializers.ModelSerializer[Row], Generic[Row]):
    """A serializer for which an unknown field is an error, and so is a read-only one that differs from what is stored.

    aliases: other names of fields, accepted and returned. In an object that is read, edited and sent back, the name that
    was edited wins.
    volatile: read-only fields that change by themselves; in a whole object sent back (PUT) they may be out of date.
    """

    aliases: ClassVar[Mapping[str, str]] = {}
    volatile: ClassVar[frozenset[str]] = frozenset()

    def build_standard_field(self, field_name: str, model_field: Any) -> Any:
        """The same bounds on every database: SQLite would take numbers that PostgreSQL's columns cannot hold."""
        field_class, options = super().build_standard_field(field_name, model_field)
        if isinstance(model_field, models.IntegerField) and not isinstance(
            model_field, models.BigIntegerField
        ):
            options["max_value"] = MAX_INTEGER
            options["min_value"] = max(options.get("min_value", -MAX_INTEGER), -MAX_INTEGER)
        return field_class, options

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, Mapping):
            data = self._checked(dict(data))
        return super().to_internal_value(data)

    def _checked(self, data: dict[str, Any]) -> dict[str, Any]:
        """The data without aliases and unchanged read-only fields."""
        stored = self.to_representation(self.instance) if isinstance(self.instance, models.Model) else {}
        errors = unknown_fields(name for name in data if name not in self.fields)
        for name in [name for name in data if name in self.fields and self.fields[name].read_only]:
            value = data.pop(name)
            out_of_date = bool(stored) and not self.partial and name in self.volatile
            if not out_of_date and not (name in stored and value == stored[name]):
                errors[name] = ["This field is read-only."]
        for alias in [alias for alias in self.aliases if alias in data]:
            name, value = self.aliases[alias], data.pop(alias)
            if name not in data or data[name] == stored.get(name, value):
                data[name] = value
            elif value not in (data[name], stored.get(name)):
                errors[alias] = [f"This is another name of {name}, which says otherwise."]
        if errors:
            raise serializers.ValidationError(errors)
        return data

    def save(self, **kwargs: Any) -> Row:
        with self.named():
            row: Row = super().save(**kwargs)
        return row

    def update(self, instance: Row, validated_data: Any) -> Row:
        self.put(instance, validated_data)
        return instance

    def put(self, row: Row, values: Mapping[str, Any]) -> bool:
        """Set columns, and check and save the row when that changes something; whether it did."""
        changed = {name for name, value in values.items() if getattr(row, name) != value}
        for name in changed:
            setattr(row, name, values[name])
        if changed:
            row.full_clean()
            row.save()
        return bool(changed)

    @property
    def user(self) -> Any:
        return self.context["request"].user

    @contextmanager
    def named(self) -> Iterator[None]:
        """What the model finds wrong, told under the names that the API has for its columns."""
        try:
            yield
        except DjangoValidationError as error:
            names = {field.source: name for name, field in self.fields.items() if name not in self.aliases}
            found = error.message_dict if hasattr(error, "error_dict") else {"__all__": error.messages}
            raise serializers.ValidationError(
                {
                    WHOLE if name == "__all__" else names.get(name, name): texts
                    for name, texts in found.items()
                }
            ) from error


@contextmanager
def blaming(field: str) -> Iterator[None]:
    """What goes wrong inside is the fault of this one field."""
    try:
        yield
    except DjangoValidationError as error:
        raise serializers.ValidationError({field: error.messages}) from error


class NotHere(APIView):
    """Answers for every path below /api that nothing else answers, with 404 in the API's shape."""

    authentication_classes: list[Any] = []
    permission_classes: list[Any] = []
    content_negotiation_class = OnlyJSON
    schema = None

    def initial(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super().initial(request, *args, **kwargs)
        raise Http404
