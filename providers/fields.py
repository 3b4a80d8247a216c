"""A column for sealed values and references."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import FieldError
from django.db import models

from providers.crypto import DOTS


class Stored(str):
    """A sealed value or a reference as the database holds it; printing it shows dots."""

    __slots__ = ()

    def __repr__(self) -> str:
        return DOTS

    __str__ = __repr__

    def raw(self) -> str:
        """The stored text itself, for opening, copying and rewrapping."""
        return str.__str__(self)


def raw(value: str) -> str:
    """The stored text, whether it came from the database or was just sealed."""
    return value.raw() if isinstance(value, Stored) else value


class SealedField(models.TextField):  # type: ignore[type-arg]
    """Text that is sealed before it gets here. It cannot be searched, printed or audited, only compared by identity."""

    audit_hidden = True

    def from_db_value(self, value: str | None, *args: Any) -> Stored | None:
        return None if value is None else Stored(value)

    def get_prep_value(self, value: Any) -> Any:
        return raw(value) if isinstance(value, str) else value

    def get_lookup(self, lookup_name: str) -> Any:
        # `exact` and `in` serve compare-and-swap while rewrapping; a prefix or pattern would be an oracle.
        if lookup_name not in {"exact", "in", "isnull"}:
            raise FieldError(f"{self.name} cannot be searched")
        return super().get_lookup(lookup_name)

    def value_to_string(self, obj: models.Model) -> str:
        return raw(self.value_from_object(obj) or "")


class HiddenJSONField(models.JSONField):
    """JSON that is never shown in the audit log; that it changed is."""

    audit_skip = True
