"""The models of one provider: listed by asking it at most every five minutes, and written one by one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.utils import timezone
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.generics import get_object_or_404
from rest_framework.request import Request
from rest_framework.response import Response

from audit import roles
from audit.api_errors import ip_of, request_id_of
from audit.api_views import Rows, StrictSerializer, tag_of
from providers import catalog
from providers.api.values import MAX_NUMBER, PURPOSES, delete_model
from providers.catalog import FACTS, Listing
from providers.errors import ProviderError
from providers.models import Provider, UpstreamModel

if TYPE_CHECKING:
    Base = Rows
else:
    Base = object

PLAIN: dict[str, Any] = {"pagination_class": None, "filter_backends": []}
NUMBER: dict[str, Any] = {"required": False, "allow_null": True, "min_value": 1, "max_value": MAX_NUMBER}
NAME = OpenApiParameter(
    "model_id", OpenApiTypes.STR, OpenApiParameter.PATH, description="Its name, which may hold slashes."
)


class UpstreamModelSerializer(StrictSerializer[UpstreamModel]):
    """One model of a provider."""

    volatile: ClassVar = frozenset({"updated_at"})

    id = serializers.CharField(source="name", max_length=255, help_text="Its name, as the provider knows it.")
    purposes = serializers.ListField(child=serializers.ChoiceField(PURPOSES), required=False)
    context_window = serializers.IntegerField(**NUMBER, help_text="Tokens.")
    dimensions = serializers.IntegerField(**NUMBER, help_text="Of an embedding.")
    capabilities = serializers.ListField(child=serializers.CharField(max_length=64), required=False)

    class Meta:
        model = UpstreamModel
        fields: ClassVar[Any] = ("id", *FACTS, "enabled", "source")
        read_only_fields: ClassVar[Any] = ("source",)
        validators: ClassVar[list[Any]] = []

    def validate_id(self, name: str) -> str:
        if self.instance is not None and name != self.instance.name:
            raise serializers.ValidationError("A model keeps its name; add the other one anew.")
        if self.instance is None and self.context["provider"].upstream_models.filter(name=name).exists():
            raise serializers.ValidationError("The provider has this model already.")
        return name

    def create(self, values: dict[str, Any]) -> UpstreamModel:
        model = UpstreamModel(
            provider=self.context["provider"], **values, created_by=self.user.get_username()
        )
        model.full_clean()
        model.save()
        return model

    def update(self, model: UpstreamModel, values: dict[str, Any]) -> UpstreamModel:
        if any(getattr(model, name) != values.get(name, getattr(model, name)) for name in FACTS):
            model.take_over()
        return super().update(model, values)


class ModelsSerializer(serializers.Serializer[Any]):
    models = UpstreamModelSerializer(many=True)
    cached = serializers.BooleanField(help_text="false: the provider was asked just now.")
    fetched_at = serializers.DateTimeField(allow_null=True, help_text="When it was last asked.")


class Models(Base):
    """`models` below a provider or server: what it has, a fresh look, and those that people add, describe and take away."""

    @extend_schema(responses=ModelsSerializer)
    @action(detail=True, methods=["get"], **PLAIN)
    def models(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Its models. It is asked for them when that was not done for five minutes; this stores nothing (POST refresh does)."""
        provider = self.get_object()
        listing, cached = catalog.recall(provider), True
        if listing is None and roles.may(request.user, self.resource, "test"):
            try:
                listing, cached = catalog.look(provider), False
            except ProviderError:
                if not provider.upstream_models.filter(enabled=True).exists():
                    raise
        return self._listed(provider, listing, cached=cached)

    @extend_schema(request=None, responses=ModelsSerializer)
    @action(detail=True, methods=["post"], url_path="models/refresh", **PLAIN)
    def refresh(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Ask the provider which models it has, and keep the answer. What people wrote about a model stays."""
        provider = self.get_object()
        found = catalog.refresh_models(
            provider, actor=request.user, via="api", ip=ip_of(request), request_id=request_id_of(request)
        )
        return self._listed(provider, Listing(timezone.now(), found.models), cached=False)

    def _listed(self, provider: Provider, listing: Listing | None, *, cached: bool) -> Response:
        """What is stored and enabled, then what the provider lists beyond that."""
        stored = {model.name: model for model in UpstreamModel.objects.filter(provider=provider)}
        rows = [model for model in stored.values() if model.enabled]
        rows += (
            [catalog.unsaved(model) for model in listing.models if model.id not in stored] if listing else []
        )
        probed_at = getattr(getattr(provider, "health", None), "last_checked_at", None)
        return Response(
            {
                "models": UpstreamModelSerializer(rows, many=True).data,
                "cached": cached,
                "fetched_at": listing.at if listing else probed_at,
            }
        )

    @extend_schema(request=UpstreamModelSerializer, responses={201: UpstreamModelSerializer})
    @models.mapping.post
    def add_model(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Add a model that the provider does not list, or describe one before it does."""
        with self.changing():
            provider = self.get_object()
            serializer = UpstreamModelSerializer(
                data=request.data, context={**self.get_serializer_context(), "provider": provider}
            )
            serializer.is_valid(raise_exception=True)
            model = serializer.save()
        return self._shown(model, 201)

    @extend_schema(parameters=[NAME], responses=UpstreamModelSerializer)
    @action(detail=True, methods=["get"], url_path=r"models/(?P<model_id>(?!refresh/?$).+?)", **PLAIN)
    def model(self, request: Request, model_id: str, *args: Any, **kwargs: Any) -> Response:
        """One model that is stored, also when it is disabled."""
        return self._shown(self._stored(model_id))

    @extend_schema(parameters=[NAME], request=UpstreamModelSerializer, responses=UpstreamModelSerializer)
    @model.mapping.patch
    def change_model(self, request: Request, model_id: str, *args: Any, **kwargs: Any) -> Response:
        """Describe a model, enable or disable it. What is described is no longer changed by what the provider tells."""
        with self.changing():
            model = self._stored(model_id)
            self.check_version(model)
            serializer = UpstreamModelSerializer(
                model, data=request.data, partial=True, context=self.get_serializer_context()
            )
            serializer.is_valid(raise_exception=True)
            serializer.save()
        return self._shown(model)

    @extend_schema(parameters=[NAME], responses={204: None})
    @model.mapping.delete
    def remove_model(self, request: Request, model_id: str, *args: Any, **kwargs: Any) -> Response:
        """Take a model away. One that the provider lists is disabled, or it would come back."""
        with self.changing():
            model = self._stored(model_id)
            self.check_version(model)
            delete_model(model)
        return Response(status=204)

    def _stored(self, name: str) -> UpstreamModel:
        return get_object_or_404(UpstreamModel, provider=self.get_object(), name=name)

    def _shown(self, model: UpstreamModel, status: int = 200) -> Response:
        shown = UpstreamModelSerializer(model, context=self.get_serializer_context())
        return Response(shown.data, status=status, headers=tag_of(model))
