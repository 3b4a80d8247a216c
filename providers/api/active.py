"""The active provider of each purpose, and its fallbacks."""

from __future__ import annotations

from typing import Any, ClassVar

from django.http import Http404
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_views import Door, KnownFields, tag_of
from providers.active import MAX_TARGETS, Target, clear_active, set_active
from providers.models import ActiveProvider, ActiveTarget, ApiKey, Provider, Purpose

TYPES = ("ai_server", "provider", "api_key")


class TargetSerializer(KnownFields):
    """What to ask: a server, a vendor with all its keys, or one key of a vendor."""

    provider_type = serializers.ChoiceField(TYPES)
    provider_id = serializers.IntegerField(
        min_value=1,
        max_value=2**63 - 1,
        help_text="The id of the server or provider; for `api_key`, of the key.",
    )
    provider_name = serializers.CharField(read_only=True)
    model = serializers.CharField(
        required=False,
        allow_blank=True,
        allow_null=True,
        max_length=255,
        help_text="Empty: the model asked for.",
    )

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        return {
            "target": find_target(values["provider_type"], values["provider_id"], values.get("model") or "")
        }

    def to_representation(self, target: ActiveTarget) -> dict[str, Any]:
        kind = "api_key" if target.api_key_id else "ai_server" if target.provider.self_hosted else "provider"
        return {
            "provider_type": kind,
            "provider_id": target.api_key_id or target.provider_id,
            "provider_name": target.provider.name,
            "model": target.model or None,
        }


class ActiveSerializer(TargetSerializer):
    purpose = serializers.ChoiceField(Purpose.choices, required=False)
    fallbacks = TargetSerializer(many=True, required=False)
    managed_by = serializers.CharField(read_only=True)
    updated_at = serializers.DateTimeField(read_only=True)

    def validate_fallbacks(self, values: list[Any]) -> list[Any]:
        if len(values) >= MAX_TARGETS:
            raise serializers.ValidationError(f"At most {MAX_TARGETS - 1} fallbacks.")
        return values

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        first = super().validate(values)["target"]
        others = [fallback["target"] for fallback in values.get("fallbacks", ())]
        return {"purpose": values.get("purpose", ""), "targets": [first, *others]}

    def to_representation(self, active: ActiveProvider) -> dict[str, Any]:  # type: ignore[override]
        first, *others = active.targets.all()
        shown = TargetSerializer(others, many=True).data
        return {
            "purpose": active.purpose,
            **super().to_representation(first),
            "fallbacks": shown,
            "managed_by": active.managed_by,
            "updated_at": serializers.DateTimeField().to_representation(active.updated_at),
        }


class AllActiveSerializer(serializers.Serializer[Any]):
    chat = ActiveSerializer(allow_null=True)
    embeddings = ActiveSerializer(allow_null=True)
    reranking = ActiveSerializer(allow_null=True)


def find_target(kind: str, number: int, model: str) -> Target:
    """The row that a type and an id mean. Raises ValidationError where there is none, or of another type."""
    if kind == "api_key":
        key = ApiKey.objects.select_related("provider").filter(pk=number).first()
        if key is None:
            raise serializers.ValidationError({"provider_id": ["There is no such key."]})
        return Target(key.provider, key, model)
    provider = Provider.objects.filter(pk=number).first()
    if provider is None or provider.self_hosted != (kind == "ai_server"):
        wanted = "server" if kind == "ai_server" else "vendor"
        raise serializers.ValidationError({"provider_id": [f"There is no such {wanted}."]})
    return Target(provider, None, model)


class Active(Door):
    """One provider for each purpose, with fallbacks in order."""

    resource = "active"
    words: ClassVar = {
        "overview": "read",
        "choose": "change",
        "retrieve": "read",
        "update": "change",
        "partial_update": "change",
        "destroy": "change",
    }
    serializer_class = ActiveSerializer
    pagination_class = None
    filter_backends: list[Any] = []
    lookup_field = "purpose"
    queryset = ActiveProvider.objects.prefetch_related("targets__provider", "targets__api_key")

    @extend_schema(operation_id="active_all", responses=AllActiveSerializer)
    def overview(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """For each purpose its active provider, or null."""
        found = {active.purpose: self.get_serializer(active).data for active in self.get_queryset()}
        return Response({purpose: found.get(purpose) for purpose in Purpose.values})

    def retrieve(self, request: Request, purpose: str, **kwargs: Any) -> Response:
        active = self.get_object()
        return Response(self.get_serializer(active).data, headers=tag_of(active))

    def choose(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Set the active provider of the purpose that the body names."""
        return self._set(request.data, None)

    def update(self, request: Request, purpose: str, **kwargs: Any) -> Response:
        """Set the active provider of this purpose."""
        if purpose not in Purpose.values:
            raise Http404
        return self._set(request.data, purpose)

    def partial_update(self, request: Request, purpose: str, **kwargs: Any) -> Response:
        """Change a part of it: what is left out stays."""
        with self.changing():
            stored = self.get_object()
            data = request.data
            if isinstance(data, dict):
                kept = {
                    name: value
                    for name, value in self.get_serializer(stored).data.items()
                    if name != "updated_at"
                }
                if {"provider_type", "provider_id"} & data.keys():
                    kept.pop("model")
                data = {**kept, **data}
            return self._set(data, purpose)

    @extend_schema(responses={204: None})
    def destroy(self, request: Request, purpose: str, **kwargs: Any) -> Response:
        """Leave this purpose without a provider."""
        with self.changing():
            self.check_version(self.get_object())
            clear_active(purpose)
        return Response(status=204)

    def _set(self, data: Any, purpose: str | None) -> Response:
        with self.changing():
            form = self.get_serializer(data=data)
            form.is_valid(raise_exception=True)
            named = form.validated_data["purpose"]
            if not (purpose or named) or (purpose and named not in {"", purpose}):
                message = "This field is required." if not named else f"The path says {purpose}."
                raise serializers.ValidationError({"purpose": [message]})
            stored = ActiveProvider.objects.filter(purpose=purpose or named).first()
            if stored is not None:
                self.check_version(stored)
            active = set_active(
                purpose or named, form.validated_data["targets"], created_by=self.request.user.get_username()
            )
        return self.shown(active)
