"""Values that several serializers of this API share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from django.core.exceptions import ValidationError as DjangoValidationError
from django.db.models import Q
from drf_spectacular.utils import extend_schema_field
from rest_framework import exceptions, serializers

from audit import roles
from providers import keys
from providers.catalog import FACTS
from providers.models import Provider, UpstreamModel

PURPOSES = ("chat", "embeddings", "reranking")
MAX_MODELS = 10_000
MAX_NUMBER = 2**31 - 1


class KeyField(serializers.CharField):
    """A secret on its way in. Empty keeps what is stored; it is never part of an answer."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("required", False)
        super().__init__(write_only=True, allow_blank=True, allow_null=True, max_length=4096, **kwargs)

    def to_internal_value(self, data: Any) -> str:
        value = str(super().to_internal_value(data))
        if value:
            try:
                keys.check_value(value)
            except DjangoValidationError as error:
                raise serializers.ValidationError(error.messages) from error
        return value


def provider_named(data: Any) -> Provider:
    """The provider that a slug or an id means. Raises ValidationError."""
    text = str(data) if isinstance(data, int | str) and not isinstance(data, bool) else ""
    condition = Q(pk=int(text)) if text.isascii() and text.isdigit() and len(text) <= 18 else Q(slug=text)
    provider = Provider.objects.filter(condition).first() if "\0" not in text else None
    if provider is None:
        raise serializers.ValidationError("There is no such provider.")
    return provider


def check_store(user: Any, value: str | None) -> None:
    """A reference makes the gateway read its environment or a file, so only an administrator writes one."""
    if value and keys.REFERENCE.match(value) and not roles.may(user, "key_stores", "add"):
        raise exceptions.PermissionDenied(
            "Only an administrator may refer to a secret that is kept elsewhere."
        )


@extend_schema_field({"type": "array", "items": {"type": "string"}})
class ModelNames(serializers.Field[Any, Any, Any, Any]):
    """The models of a provider by name. Accepts names, or objects with `id` and what is known of the model."""

    def to_representation(self, value: Any) -> list[str]:
        return [model.name for model in value.all() if model.enabled]

    def to_internal_value(self, data: Any) -> list[dict[str, Any]]:
        if not isinstance(data, list) or len(data) > MAX_MODELS:
            raise serializers.ValidationError(f"Write a list of at most {MAX_MODELS} models.")
        rows = [ModelSerializer.columns({"id": item} if isinstance(item, str) else item) for item in data]
        if len({row["name"] for row in rows}) != len(rows):
            raise serializers.ValidationError("A model stands there twice.")
        return rows


class ModelSerializer(serializers.Serializer[UpstreamModel]):
    """One model of a provider."""

    id = serializers.CharField(source="name", max_length=255)
    purposes = serializers.ListField(child=serializers.ChoiceField(PURPOSES), required=False)
    context_window = serializers.IntegerField(
        required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER
    )
    dimensions = serializers.IntegerField(required=False, allow_null=True, min_value=1, max_value=MAX_NUMBER)
    capabilities = serializers.ListField(child=serializers.CharField(max_length=64), required=False)
    enabled = serializers.BooleanField(required=False)

    @classmethod
    def columns(cls, data: Any) -> dict[str, Any]:
        """The checked columns of one model. Raises ValidationError, also for an unknown field."""
        form = cls(data=data)
        form.is_valid(raise_exception=True)
        if unknown := data.keys() - form.fields.keys() - {"source"}:
            raise serializers.ValidationError({name: ["There is no such field."] for name in unknown})
        return dict(form.validated_data)


def write_models(provider: Provider, wanted: Sequence[dict[str, Any]]) -> None:
    """Make `wanted` the models of the provider. Found ones that are not wanted stay, disabled, or they would come back."""
    stored = {model.name: model for model in provider.upstream_models.all()}
    for columns in wanted:
        model = stored.pop(columns["name"], None) or UpstreamModel(provider=provider)
        _write_model(model, {"enabled": True, **columns})
    for model in stored.values():
        delete_model(model)


def delete_model(model: UpstreamModel) -> None:
    """Take a model away; one that the provider lists is only disabled."""
    if model.source == UpstreamModel.Source.DISCOVERED:
        _write_model(model, {"enabled": False})
    else:
        model.delete()


def _write_model(model: UpstreamModel, columns: dict[str, Any]) -> None:
    if model.pk and all(getattr(model, name) == value for name, value in columns.items()):
        return
    if any(name in FACTS and getattr(model, name) != value for name, value in columns.items()):
        model.take_over()
    for name, value in columns.items():
        setattr(model, name, value)
    model.full_clean(validate_unique=False, validate_constraints=False)
    model.save()
