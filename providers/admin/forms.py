"""Forms of providers, servers and their keys."""

from __future__ import annotations

from typing import Any, ClassVar

from django import forms
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ValidationError
from unfold.widgets import UnfoldAdminCheckboxSelectMultipleWidget

from audit.admin import VersionedForm
from audit.roles import may
from providers import keys
from providers.adapters import KINDS
from providers.admin.fields import KEY_HELP, HeadersField, LinesField, ObjectField, SecretField
from providers.models import ApiKey, Provider, Purpose, UpstreamModel

HELP_FOR_NEW = KEY_HELP.removeprefix("Empty keeps the stored key. ")
SERVER_ADDRESSES = (
    "Where the server listens: http://localhost:11434 for Ollama, http://localhost:8000 for vLLM, "
    "http://localhost:8080 for llama.cpp."
)
MOVED = (
    "The keys stored here were given for another address. Enter the API key again, "
    "so that it is not sent to a new place by mistake."
)


class WithSecret(VersionedForm):
    """A form with an `api_key` input. `user` is set by the page, for what only some roles may write."""

    user: ClassVar[AbstractBaseUser | AnonymousUser]
    api_key = SecretField(label="API key")

    def clean_api_key(self) -> str:
        value: str = self.cleaned_data["api_key"]
        if keys.REFERENCE.match(value) and not may(self.user, "key_stores", "write"):
            raise ValidationError("Only an administrator may say where a key is kept; enter the key itself.")
        return value


class ProviderForm(WithSecret):
    custom_headers = HeadersField(
        label="Extra headers", help_text="Sent with every request, one in each line: X-Team: blue"
    )
    metadata = ObjectField()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk and "api_key" in self.fields:
            stored = self.instance.keys.filter(is_default=True).first() or self.instance.keys.first()
            self.fields["api_key"].show_stored(stored)  # type: ignore[attr-defined]  # it is a SecretField
        if "base_url" in self.fields and not self.instance.pk:
            # A vendor's address is known from its kind.
            self.fields["base_url"].required = False
        if not self.instance.pk and "api_key" in self.fields:
            self.fields["api_key"].help_text = HELP_FOR_NEW

    def clean(self) -> dict[str, Any] | None:
        cleaned = super().clean()
        kind = KINDS.get(self.cleaned_data.get("kind") or self.instance.kind)
        if "base_url" in self.cleaned_data and not self.cleaned_data["base_url"] and kind is not None:
            self._default_address(kind.base_url, self_hosted=kind.self_hosted)
        if self._moves() and not self.cleaned_data.get("api_key"):
            self.add_error("api_key", MOVED)
        return cleaned

    def _default_address(self, address: str, *, self_hosted: bool) -> None:
        if self_hosted:
            self.add_error("base_url", f"Write where the server listens, like {address}")
        else:
            self.cleaned_data["base_url"] = address.rstrip("/")

    def _moves(self) -> bool:
        """Whether stored keys would be sent to another origin (R25)."""
        address = self.cleaned_data.get("base_url")
        if not self.instance.pk or not address:
            return False
        try:
            return keys.moves(self.instance, address.strip())
        except ValueError:  # no address at all; the column's own check says so
            return False

    class Meta:
        model = Provider
        fields: ClassVar[list[str]] = []


class ServerForm(ProviderForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "base_url" in self.fields:
            self.fields["base_url"].help_text = SERVER_ADDRESSES
        if "api_key" in self.fields:
            self.fields["api_key"].label = "API key (if it wants one)"


class VendorForm(ProviderForm):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "base_url" in self.fields and not self.instance.pk:
            self.fields["base_url"].help_text = "Empty: the vendor's own address."


class ApiKeyForm(WithSecret):
    metadata = ObjectField()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if "api_key" not in self.fields:
            return
        if self.instance.pk:
            self.fields["api_key"].show_stored(self.instance)  # type: ignore[attr-defined]  # it is a SecretField
        else:
            self.fields["api_key"].required = True
            self.fields["api_key"].help_text = HELP_FOR_NEW

    class Meta:
        model = ApiKey
        fields: ClassVar[list[str]] = []


class ModelForm(VersionedForm):
    purposes = forms.MultipleChoiceField(
        choices=Purpose.choices,
        required=False,
        widget=UnfoldAdminCheckboxSelectMultipleWidget,
        help_text="None ticked: what its provider is used for.",
    )
    capabilities = LinesField(help_text="One in each line, like tools or vision.")

    class Meta:
        model = UpstreamModel
        fields: ClassVar[list[str]] = []
