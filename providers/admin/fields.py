"""Form fields of the admin: secrets that are only ever written, and columns of structure typed as lines."""

from __future__ import annotations

from typing import Any

from django import forms
from django.core.exceptions import ValidationError
from django.forms.fields import InvalidJSONInput
from unfold.widgets import TEXTAREA_CLASSES, UnfoldAdminPasswordWidget, UnfoldAdminTextareaWidget

from audit.strict_json import StrictJSONError, loads, readable
from providers import keys
from providers.models import ApiKey
from providers.models.checks import check_metadata

KEY_HELP = (
    "Empty keeps the stored key. Instead of the key itself you may write where it is kept: "
    "env://NAME for an environment variable, file:///path for a file."
)


class SecretField(forms.CharField):
    """A secret that goes in and never comes out: nothing stored or typed is ever written into the page (R08)."""

    def __init__(self, **kwargs: Any) -> None:
        # Browsers ignore "off" in password inputs and would fill in the person's own password; this word stops them.
        attributes = {
            "autocomplete": "new-password",
            "spellcheck": "false",
            "data-1p-ignore": "",
            "data-lpignore": "true",
        }
        super().__init__(
            required=kwargs.pop("required", False),
            strip=True,
            max_length=4096,
            help_text=kwargs.pop("help_text", KEY_HELP),
            widget=UnfoldAdminPasswordWidget(attrs=attributes, render_value=False),
            validators=[keys.check_value],
            **kwargs,
        )

    def show_stored(self, key: ApiKey | None) -> None:
        """Say which key is stored, by its reference or its last four characters."""
        if key is None:
            text = "no key stored"
        elif key.reference:
            text = key.reference
        else:
            text = f"…{key.last4}" if key.last4 else "a key is stored"
        self.widget.attrs["placeholder"] = text


class LinesField(forms.CharField):
    """A list of text, one item in each line."""

    def __init__(self, *, rows: int = 3, **kwargs: Any) -> None:
        attributes = {"rows": rows, "spellcheck": "false", "class": " ".join(TEXTAREA_CLASSES)}
        super().__init__(required=False, widget=forms.Textarea(attrs=attributes), **kwargs)

    def prepare_value(self, value: Any) -> Any:
        return "\n".join(str(item) for item in value) if isinstance(value, list) else value

    def to_python(self, value: Any) -> Any:
        return [line.strip() for line in (super().to_python(value) or "").splitlines() if line.strip()]

    def validate(self, value: Any) -> None:
        """An empty list is a value."""

    def run_validators(self, value: Any) -> None:
        """Each line is text like any other; the column's own validators judge the list."""
        for line in value:
            super().run_validators(line)

    def has_changed(self, initial: Any, data: Any) -> bool:
        return bool((initial or []) != self.to_python(data))


class HeadersField(LinesField):
    """HTTP headers, one `Name: value` in each line."""

    def prepare_value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return "\n".join(f"{name}: {content}" for name, content in value.items())
        return value

    def to_python(self, value: Any) -> Any:
        if isinstance(value, dict):
            return value
        headers: dict[str, str] = {}
        for line in super().to_python(value):
            name, colon, content = line.partition(":")
            if not colon:
                raise ValidationError("Write one header in each line, like X-Team: blue")
            if name.strip().lower() in {known.lower() for known in headers}:
                raise ValidationError(f"{name.strip()[:64]} stands there twice.")
            headers[name.strip()] = content.strip()
        return headers

    def has_changed(self, initial: Any, data: Any) -> bool:
        try:
            return bool((initial or {}) != self.to_python(data))
        except ValidationError:
            return True


class ObjectField(forms.JSONField):
    """An object typed as JSON, read as strictly as by the API. An empty box, or null, is an empty object."""

    default_validators = [check_metadata]

    def __init__(self, **kwargs: Any) -> None:
        widget = UnfoldAdminTextareaWidget({"spellcheck": "false"})
        super().__init__(required=False, initial=dict, widget=widget, **kwargs)
        # Whatever else is empty, like a list, is for the validators to refuse.
        self.empty_values = [None, {}]

    def prepare_value(self, value: Any) -> Any:
        return value if isinstance(value, InvalidJSONInput) else readable(value)

    def bound_data(self, data: Any, initial: Any) -> Any:
        """What was typed is shown again as it was typed."""
        return InvalidJSONInput(data or "")

    def to_python(self, value: Any) -> Any:
        try:
            found = loads(value.encode()) if value and value.strip() else None
        except StrictJSONError as error:
            raise ValidationError(str(error)) from error
        return {} if found is None else found
