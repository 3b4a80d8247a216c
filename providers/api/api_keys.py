"""Keys of vendors. A key is written, tested and counted here; it is never read."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models.query import QuerySet
from django_filters import rest_framework as filters
from drf_spectacular.utils import extend_schema, extend_schema_field
from rest_framework import exceptions, serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit import roles
from audit.api_bulk import Bulk
from audit.api_views import KnownFields, Rows, StrictSerializer, blaming
from providers import keyring, keys
from providers.adapters import SELF_HOSTED
from providers.api.trials import KeyTrialSerializer, try_key
from providers.api.values import KeyField, check_store, provider_named
from providers.models import ApiKey, KeyUse, Provider
from providers.models.limited import LIMITS

USE = ("requests_count", "tokens_used", "cost_usd", "last_used_at")
TROUBLES = ("rejected_at", "undecryptable_at")


@extend_schema_field({"type": "string", "description": "The slug of a vendor; its id is accepted too."})
class VendorField(serializers.Field[Any, Any, Any, Any]):
    def to_representation(self, value: Provider) -> str:
        return value.slug

    def to_internal_value(self, data: Any) -> Provider:
        provider = provider_named(data)
        if provider.self_hosted:
            raise serializers.ValidationError("This is a server; its key is set with the server itself.")
        return provider


class ApiKeySerializer(StrictSerializer[ApiKey]):
    aliases: ClassVar = {"is_active": "enabled", "use_for_ops_center": "is_default"}
    volatile: ClassVar = frozenset({*USE, *TROUBLES, "updated_at"})

    provider = VendorField()
    key_name = serializers.CharField(source="name", max_length=100)
    api_key = KeyField(help_text="Required for a new key. Empty or left out keeps the stored one.")
    masked_key = serializers.CharField(read_only=True)
    is_active = serializers.BooleanField(
        source="enabled", required=False, help_text="Another name of `enabled`."
    )
    use_for_ops_center = serializers.BooleanField(
        source="is_default", required=False, help_text="Another name of `is_default`."
    )
    requests_count = serializers.IntegerField(source="use.requests_count", read_only=True)
    tokens_used = serializers.IntegerField(source="use.tokens_used", read_only=True)
    cost_usd = serializers.SerializerMethodField()
    last_used_at = serializers.DateTimeField(source="use.last_used_at", read_only=True, allow_null=True)
    rejected_at = serializers.DateTimeField(
        source="use.rejected_at",
        read_only=True,
        allow_null=True,
        help_text="When the provider last refused the key.",
    )
    undecryptable_at = serializers.DateTimeField(
        source="use.undecryptable_at",
        read_only=True,
        allow_null=True,
        help_text="Since when the stored secret is known not to open; a new secret ends it.",
    )

    class Meta:
        model = ApiKey
        fields: ClassVar[Any] = (
            "id", "provider", "key_name", "api_key", "masked_key", "enabled", "is_active", "is_default",
            "use_for_ops_center", "weight", *LIMITS, "metadata", *USE, *TROUBLES, "managed_by", "created_by", "created_at",
            "updated_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = ("managed_by", "created_by")
        validators: ClassVar[list[Any]] = []

    def get_cost_usd(self, key: ApiKey) -> float:
        return key.use.cost_nanodollars / 1e9

    def to_representation(self, key: ApiKey) -> dict[str, Any]:
        if not hasattr(key, "use"):
            # Never used: the row's defaults, which this makes the key's without storing them.
            KeyUse(api_key=key)
        return super().to_representation(key)

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        check_store(self.user, values.get("api_key"))
        if self.instance is None and not values.get("api_key"):
            raise serializers.ValidationError({"api_key": ["This field is required."]})
        if (
            self.instance is not None
            and values.get("provider", self.instance.provider) != self.instance.provider
        ):
            raise serializers.ValidationError(
                {"provider": ["A key stays with its provider; add it there anew."]}
            )
        return values

    def create(self, values: dict[str, Any]) -> ApiKey:
        value = values.pop("api_key")
        key = ApiKey(**values, created_by=self.user.get_username())
        with blaming("api_key"):
            keys.store(key, value)
        if key.is_default:
            keys.clear_default(key.provider, but=key)
        key.full_clean()
        keys.add(key, value)
        return key

    def update(self, key: ApiKey, values: dict[str, Any]) -> ApiKey:
        value = values.pop("api_key", None)
        values.pop("provider", None)
        changed = sorted(name for name, new in values.items() if getattr(key, name) != new)
        if changed and not roles.may(self.user, "api_keys", "change"):
            raise exceptions.PermissionDenied("You may replace the secret of this key, and nothing else.")
        if values.get("is_default") and not key.is_default:
            keys.clear_default(key.provider, but=key)
        if value:
            with blaming("api_key"):
                keys.store(key, value)
            key.full_clean()
            key.save()
        self.put(key, values)
        return key


class WholeKeySerializer(KnownFields):
    api_key = serializers.CharField(write_only=True, max_length=4096)


class FingerprintSerializer(serializers.Serializer[Any]):
    fingerprint = serializers.CharField()


class ApiKeyFilter(filters.FilterSet):  # type: ignore[misc]
    provider = filters.CharFilter(field_name="provider__slug")
    enabled_only = filters.BooleanFilter(method="only_enabled")

    class Meta:
        model = ApiKey
        fields: ClassVar = ["provider", "enabled", "is_default"]

    def only_enabled(self, rows: QuerySet[ApiKey], name: str, value: bool) -> QuerySet[ApiKey]:
        return rows.filter(enabled=True) if value else rows


class ApiKeys(Bulk, Rows):
    """Keys of vendors; the keys of servers are set with the server."""

    resource = "api_keys"
    words: ClassVar = {
        "update": "replace",
        "partial_update": "replace",
        "test": "test",
        "fingerprint": "test",
    }
    serializer_class = ApiKeySerializer
    queryset = ApiKey.objects.exclude(provider__kind__in=SELF_HOSTED).select_related("provider", "use")
    filterset_class = ApiKeyFilter
    search_fields = ("name", "provider__slug", "provider__name")
    ordering_fields = ("id", "name", "provider__slug", "enabled", "weight", "created_at", "updated_at")

    @extend_schema(request=None, responses=KeyTrialSerializer)
    @action(detail=True, methods=["post"])
    def test(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Ask the provider whether it takes this key, by the cheapest call it has. 200 whatever the result."""
        return Response(try_key(self.get_object()))

    @extend_schema(request=WholeKeySerializer, responses=FingerprintSerializer)
    @action(detail=False, methods=["post"], pagination_class=None, filter_backends=[])
    def fingerprint(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """The keyed hash under which the audit log knows this key: was it ever stored here? Nothing is kept of the key."""
        form = WholeKeySerializer(data=request.data)
        form.is_valid(raise_exception=True)
        return Response({"fingerprint": keyring.current().fingerprint(form.validated_data["api_key"])})
