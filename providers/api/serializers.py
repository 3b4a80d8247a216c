"""Providers and servers as the API shows and takes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, TypeVar

from drf_spectacular.utils import extend_schema_field
from rest_framework import exceptions, serializers

from audit import roles
from audit.api_views import StrictSerializer, blaming
from providers import keys
from providers.adapters import KINDS, SELF_HOSTED
from providers.api.values import KeyField, ModelNames, check_store, write_models
from providers.models import ApiKey, Provider, ProviderHealth, ProviderUse, Server, Status, Verdict
from providers.wire import origin_of

P = TypeVar("P", bound=Provider)

HEALTH = (
    "status",
    "health_status",
    "is_healthy",
    "consecutive_failures",
    "latency_ms",
    "last_health_check",
    "models_count",
)
COUNTERS = ("requests_count", "tokens_used", "cost_usd", "last_used_at")
USES = ("use_for_chat", "use_for_embeddings", "use_for_reranking")
TUNING = (
    "connect_timeout_seconds",
    "first_token_timeout_seconds",
    "idle_timeout_seconds",
    "request_timeout_seconds",
    "probe_interval_seconds",
)
COLUMNS = (
    "id", "slug", "name", "kind", "base_url", "api_key", "masked_key", "models", "custom_headers", "enabled", "is_active",
    "priority", *USES, "model_path", "allow_private", "ca_pem", *TUNING, *HEALTH, "last_tested_at", *COUNTERS, "metadata",
    "managed_by", "created_by", "created_at", "updated_at",
)  # fmt: skip


def kinds(names: Iterable[str]) -> list[tuple[str, str]]:
    return [(name, KINDS[name].label) for name in sorted(names)]


ALL_KINDS = kinds(KINDS)
SERVER_KINDS = kinds(SELF_HOSTED)


class ProviderSerializer(StrictSerializer[P]):
    aliases: ClassVar = {"is_active": "enabled"}
    volatile: ClassVar = frozenset({*HEALTH, "last_tested_at", *COUNTERS, "updated_at"})

    kind = serializers.ChoiceField(ALL_KINDS, required=False)
    slug = serializers.CharField(required=False, allow_blank=True, max_length=63)
    base_url = serializers.CharField(
        required=False, max_length=500, help_text="The default of a vendor's kind is its public address."
    )
    api_key = KeyField(help_text="Becomes the default key. Empty or left out keeps the stored one.")
    masked_key = serializers.SerializerMethodField()
    models = ModelNames(source="upstream_models", required=False)
    is_active = serializers.BooleanField(
        source="enabled", required=False, help_text="Another name of `enabled`."
    )
    status = serializers.ChoiceField(Status.choices, source="health.status", read_only=True)
    health_status = serializers.ChoiceField(Verdict.choices, source="health.health_status", read_only=True)
    is_healthy = serializers.BooleanField(source="health.is_healthy", read_only=True)
    consecutive_failures = serializers.IntegerField(source="health.consecutive_failures", read_only=True)
    latency_ms = serializers.FloatField(source="health.latency_ms", read_only=True, allow_null=True)
    last_health_check = serializers.DateTimeField(
        source="health.last_checked_at", read_only=True, allow_null=True
    )
    last_tested_at = serializers.DateTimeField(
        source="health.last_checked_at",
        read_only=True,
        allow_null=True,
        help_text="Another name of `last_health_check`.",
    )
    models_count = serializers.SerializerMethodField()
    requests_count = serializers.IntegerField(source="use.requests_count", read_only=True)
    tokens_used = serializers.IntegerField(source="use.tokens_used", read_only=True)
    cost_usd = serializers.SerializerMethodField()
    last_used_at = serializers.DateTimeField(source="use.last_used_at", read_only=True, allow_null=True)

    class Meta:
        model = Provider
        fields: ClassVar[Any] = COLUMNS
        read_only_fields: ClassVar[Any] = ("managed_by", "created_by")
        validators: ClassVar[list[Any]] = []

    @extend_schema_field({"type": ["string", "null"]})
    def get_masked_key(self, provider: P) -> str | None:
        """The default key, else the first, as it may be shown."""
        found = sorted(provider.keys.all(), key=lambda key: (not key.is_default, key.pk))
        return found[0].masked_key if found else None

    def get_models_count(self, provider: P) -> int:
        return sum(model.enabled for model in provider.upstream_models.all())

    def get_cost_usd(self, provider: P) -> float:
        return provider.use.cost_nanodollars / 1e9

    def to_representation(self, provider: P) -> dict[str, Any]:
        # Not probed or used yet: what the rows' defaults say, which this makes the provider's without storing them.
        if not hasattr(provider, "health"):
            ProviderHealth(provider=provider)
        if not hasattr(provider, "use"):
            ProviderUse(provider=provider)
        return super().to_representation(provider)

    def validate_base_url(self, value: str) -> str:
        try:
            origin_of(value)
        except ValueError as error:
            raise serializers.ValidationError("This is not the address of a server.") from error
        return value.strip().rstrip("/")

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        check_store(self.user, values.get("api_key"))
        before = self.instance.allow_private if self.instance is not None else False
        allowed = roles.may(self.user, "allow_private", "change")
        if values.get("allow_private", before) != before and not allowed:
            raise exceptions.PermissionDenied("Only an administrator may set allow_private.")
        return values

    def create(self, values: dict[str, Any]) -> P:
        api_key, models = values.pop("api_key", None), values.pop("upstream_models", None)
        provider: P = self.Meta.model(**values, created_by=self.user.get_username())  # type: ignore[assignment]
        provider.base_url = provider.base_url or default_url(provider.kind)
        provider.full_clean()
        provider.save()
        if api_key:
            self._write_key(provider, api_key, enable="enabled" not in values)
        self._write_models(provider, models)
        return provider

    def update(self, provider: P, values: dict[str, Any]) -> P:
        """A changed scheme, host or port would take the stored key to someone else, so it is entered again (R25)."""
        api_key, models = values.pop("api_key", None), values.pop("upstream_models", None)
        moves = keys.moves(provider, values.get("base_url", provider.base_url))
        if moves and not api_key:
            raise serializers.ValidationError(
                {"api_key": ["Enter the key again: base_url now leads to another scheme, host or port."]}
            )
        saved = self.put(provider, values)
        if api_key:
            key = self._write_key(provider, api_key, enable="enabled" not in values)
            if moves:
                keys.disable_left_behind(provider, but=key)
            if not saved:
                # The key is shown with the provider, so the version is that of both.
                provider.save()
        self._write_models(provider, models)
        return provider

    def _write_key(self, provider: P, value: str, *, enable: bool) -> ApiKey:
        with blaming("api_key"):
            return keys.write_default(
                provider,
                value,
                created_by=self.user.get_username(),
                enable=enable,
                revive=roles.may(self.user, "api_keys", "change"),
            )

    @staticmethod
    def _write_models(provider: P, models: list[dict[str, Any]] | None) -> None:
        if models is not None:
            with blaming("models"):
                write_models(provider, models)


class ServerSerializer(ProviderSerializer[Server]):
    """A provider of a self-hosted kind, with the names that clients of servers know."""

    aliases: ClassVar = {"is_active": "enabled", "server_type": "kind"}

    kind = serializers.ChoiceField(SERVER_KINDS, required=False)
    server_type = serializers.ChoiceField(
        SERVER_KINDS, source="kind", required=False, help_text="Another name of `kind`."
    )
    base_url = serializers.CharField(max_length=500)

    class Meta(ProviderSerializer.Meta):
        model = Server
        fields: ClassVar[Any] = (*COLUMNS[:4], "server_type", *COLUMNS[4:])


class UnsavedSerializer(ProviderSerializer[Provider]):
    """A provider that is only tried out: it needs no name, and may have that of a stored one."""

    name = serializers.CharField(required=False, max_length=100, default="unsaved")


def default_url(kind: str) -> str:
    """The public address of a vendor. Raises ValidationError where there is none to assume."""
    if kind in SELF_HOSTED or not KINDS[kind].base_url:
        raise serializers.ValidationError({"base_url": ["This field is required."]})
    return KINDS[kind].base_url.rstrip("/")
