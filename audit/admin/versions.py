"""Forms that refuse to overwrite silently what somebody else saved meanwhile (F40)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from django import forms
from django.core.exceptions import ValidationError
from django.db.models import Model
from django.utils.crypto import constant_time_compare, salted_hmac

from audit.changes import identity_of
from audit.diff import state_of
from audit.models import Entry

if TYPE_CHECKING:
    ModelForm = forms.ModelForm[Any]
else:
    from django.forms import ModelForm


def row_version(row: Model) -> str:
    """What changes when the row does: its own version, else a keyed digest of its columns and memberships."""
    version = getattr(row, "version", None)
    if version is not None:
        return str(version)
    members = {
        field.name: sorted(getattr(row, field.name).values_list("pk", flat=True))
        for field in row._meta.many_to_many
    }
    text = json.dumps([state_of(row), members], sort_keys=True, default=str)
    return salted_hmac("audit.admin.row_version", text).hexdigest()


class VersionedForm(ModelForm):
    """A form that refuses to overwrite what somebody else saved after it was opened (F40)."""

    row_version = forms.CharField(required=False, widget=forms.HiddenInput)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.initial["row_version"] = row_version(self.instance)

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        opened = self.cleaned_data.get("row_version")
        if self.instance.pk and opened and not constant_time_compare(opened, row_version(self.instance)):
            raise ValidationError(overwritten(self.instance))
        return cleaned


def overwritten(row: Model) -> str:
    """Why a save is refused, with who was faster and when, as far as the log knows."""
    identity = identity_of(row)
    entry = Entry.objects.filter(entity_type=identity.entity_type, entity_id=identity.entity_id).first()
    who = f"{entry.username or entry.get_via_display()} changed" if entry else "Somebody changed"
    when = f" at {entry.timestamp:%Y-%m-%d %H:%M:%S} UTC" if entry else ""
    return (
        f"{who} this{when}, after you opened the page, so nothing was saved. "
        "Reload the page to see it as it is now, then make your change again."
    )
