"""Columns as a document holds them: JSON values, and other rows by name."""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Mapping
from typing import Any

from django.core.exceptions import ValidationError
from django.db import models
from django.utils.dateparse import parse_datetime

from audit.api_views import MAX_INTEGER
from providers.fields import Stored, raw

Row = models.Model

MAX_BIG = 2**63 - 1
NAMED_BY: Mapping[str, str] = {
    "auth.group": "name",
    "auth.user": "username",
    "providers.provider": "slug",
    "proxy.gatewaykey": "name",
    "proxy.modelroute": "name",
}
"""How a row is named where another one refers to it: the column, which must be unique."""

_TYPES: tuple[tuple[type[models.Field[Any, Any]], type | tuple[type, ...], str], ...] = (
    (models.BooleanField, bool, "Write true or false."),
    (models.IntegerField, int, "Write a whole number."),
    (models.FloatField, (int, float), "Write a number."),
    (models.DecimalField, (int, str), "Write a number, in quotes."),
    (models.DateTimeField, str, "Write a date and time like 2030-01-31T12:00:00Z."),
    (models.DateField, str, "Write a date like 2030-01-31."),
    (models.UUIDField, str, "Write a UUID."),
    (models.TextField, str, "Write text."),
    (models.CharField, str, "Write text."),
    (models.GenericIPAddressField, str, "Write an address."),
)


def name_of(row: Row | None) -> str | None:
    """What another row's reference to this one says."""
    return None if row is None else str(getattr(row, NAMED_BY[row._meta.label_lower]))


def read(row: Row, column: str) -> Any:
    """A column of a row as a document holds it."""
    field = row._meta.get_field(column)
    if isinstance(field, models.ForeignKey):
        return name_of(getattr(row, column))
    value = getattr(row, column)
    if isinstance(value, datetime.datetime):
        return value.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")
    if isinstance(value, Stored):
        return raw(value)
    if isinstance(value, uuid.UUID | decimal.Decimal | datetime.date):
        return str(value)
    return value


def accepted(model: type[Row], column: str, value: Any) -> Any:
    """What to put into a column for a value of a document. Raises ValidationError, which repeats nothing of the value."""
    field = model._meta.get_field(column)
    if isinstance(field, models.ForeignKey):
        return _referred(field, value)
    if value is None and field.null:
        return None
    if isinstance(field, models.JSONField):
        return value
    for kind, types, hint in _TYPES:
        if isinstance(field, kind):
            if not isinstance(value, types) or (isinstance(value, bool) and types is not bool):
                raise ValidationError(hint)
            return _converted(field, value, hint)
    raise AssertionError(f"{model.__name__}.{column} has a type that no document holds")


def _converted(field: Any, value: Any, hint: str) -> Any:
    if isinstance(field, models.DateTimeField):
        return _moment(value, hint)
    most = MAX_BIG if isinstance(field, models.BigIntegerField) else MAX_INTEGER
    if isinstance(value, int) and abs(value) > most:
        raise ValidationError(f"Write a number of at most {most}.")
    try:
        return field.to_python(value)
    except ValidationError as error:
        raise ValidationError(hint) from error


def _moment(text: str, hint: str) -> datetime.datetime:
    try:
        moment = parse_datetime(text)
    except ValueError as error:
        raise ValidationError(hint) from error
    if moment is None:
        raise ValidationError(hint)
    return moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)


def _referred(field: models.ForeignKey[Any, Any], value: Any) -> Row | None:
    """The row that is meant by its name."""
    model: Any = field.related_model
    if value is None and field.null:
        return None
    if not isinstance(value, str):
        raise ValidationError("Write its name, in quotes.")
    row: Row | None = model._default_manager.filter(**{NAMED_BY[model._meta.label_lower]: value}).first()
    if row is None:
        raise ValidationError(f"There is no such {model._meta.verbose_name}.")
    return row
