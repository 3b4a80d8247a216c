"""Providers and servers: rows, tests, health and models."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from django.db.models.query import QuerySet
from django_filters import rest_framework as filters
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_bulk import Bulk
from audit.api_views import KnownFields, Rows, blaming
from audit.diff import difference
from providers import keys
from providers.api.models import Models
from providers.api.serializers import ProviderSerializer, ServerSerializer, UnsavedSerializer, default_url
from providers.api.trials import TrialSerializer, try_out, try_stored
from providers.health import set_override
from providers.models import ApiKey, Provider, ProviderHealth, Server


class ProviderHealthSerializer(serializers.ModelSerializer[ProviderHealth]):
    """How a provider feels now. `status` is what the last probe saw, `health_status` the verdict."""

    last_health_check = serializers.DateTimeField(source="last_checked_at", read_only=True, allow_null=True)

    class Meta:
        model = ProviderHealth
        fields: ClassVar[Any] = (
            "status", "health_status", "is_healthy", "override", "consecutive_failures", "status_code", "latency_ms",
            "detail", "models_count", "last_health_check", "changed_at", "next_probe_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = fields


class OverrideSerializer(KnownFields):
    is_healthy = serializers.BooleanField(allow_null=True, help_text="null lifts the override.")


class ProviderFilter(filters.FilterSet):  # type: ignore[misc]
    enabled_only = filters.BooleanFilter(method="only_enabled")
    is_active = filters.BooleanFilter(field_name="enabled")
    health_status = filters.CharFilter(field_name="health__health_status")

    class Meta:
        model = Provider
        fields: ClassVar = ["kind", "enabled", "slug"]

    def only_enabled(self, rows: QuerySet[Provider], name: str, value: bool) -> QuerySet[Provider]:
        return rows.filter(enabled=True) if value else rows


class Providers(Bulk, Models, Rows):
    """Everything that can answer: vendors and servers of our own."""

    resource = "providers"
    words: ClassVar = {
        "test": "test",
        "test_direct": "test",
        "health": "read",
        "override": "override",
        "models": "read",
        "model": "read",
        "add_model": "change",
        "change_model": "change",
        "remove_model": "change",
        "refresh": "test",
    }
    serializer_class: Any = ProviderSerializer
    queryset = Provider.objects.select_related("health", "use").prefetch_related("keys", "upstream_models")
    filterset_class = ProviderFilter
    search_fields = ("name", "slug", "base_url")
    ordering_fields = ("id", "name", "slug", "kind", "priority", "enabled", "created_at", "updated_at")

    @extend_schema(request=None, responses=TrialSerializer)
    @action(detail=True, methods=["post"])
    def test(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Ask the provider the cheapest question it has, with its default key. 200 whatever the result."""
        return Response(try_stored(self.get_object()))


class VendorsAndServers(Providers):
    """What `providers` has beyond `servers`: health with its override, and a test of what is not saved."""

    @extend_schema(responses=ProviderHealthSerializer)
    @action(detail=True, methods=["get"], pagination_class=None, filter_backends=[])
    def health(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """How the provider feels now."""
        return self._health(self.get_object())

    @extend_schema(request=OverrideSerializer, responses=ProviderHealthSerializer)
    @health.mapping.patch
    def override(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Say that the provider is well, or is not, whatever its probes see; the count of failures starts anew."""
        form = OverrideSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        with self.changing():
            provider = self.get_object()
            set_override(provider, form.validated_data["is_healthy"])
        return self._health(self.get_object())

    @extend_schema(responses=TrialSerializer)
    @action(detail=False, methods=["post"], url_path="test-direct", serializer_class=UnsavedSerializer)
    def test_direct(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Test a provider that is not saved, and save nothing but the audit entry that it was dialled."""
        form: Any = self.get_serializer(data=request.data)
        form.is_valid(raise_exception=True)
        values = {**form.validated_data}
        api_key, _ = values.pop("api_key", None), values.pop("upstream_models", None)
        provider = Provider(**values)
        provider.base_url = provider.base_url or default_url(provider.kind)
        with form.named():
            provider.full_clean(validate_unique=False, validate_constraints=False)
        credential, key = None, ApiKey(provider=provider, name="unsaved")
        if api_key:
            with blaming("api_key"):
                keys.store(key, api_key)
            credential = key.credential()
        self._note_test(provider, key.fingerprint if credential else "")
        return Response(try_out(provider, credential))

    def _note_test(self, provider: Provider, fingerprint: str) -> None:
        """Whom we dial is the caller's choice, as if he had saved it, so it is recorded before it happens."""
        identity = dataclasses.replace(provider.audit_identity(), entity_id="")
        dialled = {"base_url": provider.base_url, "kind": provider.kind, "fingerprint": fingerprint}
        with self.changing() as change:
            change.add(verb="test", identity=identity, changes=difference({}, dialled))

    def _health(self, provider: Provider) -> Response:
        return Response(ProviderHealthSerializer(getattr(provider, "health", None) or ProviderHealth()).data)


class Servers(Providers):
    """The servers that we run ourselves: vLLM, Ollama, llama.cpp and anything OpenAI-compatible."""

    serializer_class = ServerSerializer
    queryset = Server.objects.select_related("health", "use").prefetch_related("keys", "upstream_models")
