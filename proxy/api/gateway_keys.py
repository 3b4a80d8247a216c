"""Gateway keys: issued, limited, rotated and revoked. The key itself is answered once, when it is made."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

from django.conf import settings
from django.db.models.query import QuerySet
from drf_spectacular.utils import extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit import roles
from audit.api_bulk import Bulk
from audit.api_errors import Conflict
from audit.api_views import KnownFields, Rows, StrictSerializer, word_of
from proxy import keys
from proxy.api.budgets import KeyBudget
from proxy.api.owners import OwnerField
from proxy.models import GatewayKey, GatewayKeyUse
from proxy.models.budgets import current_accounts
from proxy.models.keys import keys_of

MAX_OVERLAP_SECONDS = 30 * 24 * 3600
USE = ("requests_count", "tokens_used", "cost_usd", "last_used_at")


class GatewayKeySerializer(KeyBudget, StrictSerializer[GatewayKey]):
    aliases: ClassVar = {"is_active": "enabled"}
    volatile: ClassVar = frozenset({*USE, "updated_at", "spent_usd"})

    owner = OwnerField(source="holder", required=False, allow_null=True)
    is_active = serializers.BooleanField(
        source="enabled", required=False, help_text="Another name of `enabled`."
    )
    prefix = serializers.CharField(read_only=True)
    requests_count = serializers.IntegerField(source="use.requests_count", read_only=True)
    tokens_used = serializers.IntegerField(source="use.tokens_used", read_only=True)
    cost_usd = serializers.SerializerMethodField()
    last_used_at = serializers.DateTimeField(source="use.last_used_at", read_only=True, allow_null=True)

    class Meta:
        model = GatewayKey
        fields: ClassVar[Any] = (
            "id", "name", "owner", "enabled", "is_active", "prefix", "last4", "requests_per_minute", "tokens_per_minute",
            "max_concurrency", "budget_usd", "budget_window", "spent_usd", "allowed_models", "allowed_networks",
            "resume_streams", "record_text", "cache_seconds", "cache_emptied_at", "expires_at", "revoked_at", *USE,
            "managed_by", "created_by", "created_at", "updated_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = (
            "last4",
            "revoked_at",
            "cache_emptied_at",
            "managed_by",
            "created_by",
        )
        validators: ClassVar[list[Any]] = []
        extra_kwargs: ClassVar[Any] = {
            "max_concurrency": {
                "help_text": "Null: no limit. Left out of a new key: DEFAULT_MAX_CONCURRENCY, 50 unless set otherwise."
            }
        }

    def get_cost_usd(self, key: GatewayKey) -> float:
        return key.use.cost_nanodollars / 1e9

    def to_representation(self, key: GatewayKey) -> dict[str, Any]:
        if not hasattr(key, "use"):
            # Never used: the row's defaults, which this makes the key's without storing them.
            GatewayKeyUse(gateway_key=key)
        return super().to_representation(key)

    def create(self, values: dict[str, Any]) -> GatewayKey:
        budget = self.take_budget(values)
        values.setdefault("max_concurrency", keys.default_concurrency())
        key = GatewayKey(**values, created_by=self.user.get_username())
        # Lives only on this object, for the one answer that shows it.
        key.whole = keys.give_secret(key)  # type: ignore[attr-defined]
        key.full_clean()
        key.save()
        self.give_budget(key, budget)
        return key

    def update(self, key: GatewayKey, values: dict[str, Any]) -> GatewayKey:
        if key.revoked_at is not None and values.get("enabled"):
            raise Conflict("A revoked key stays revoked; issue another one.")
        budget = self.take_budget(values)
        self.put(key, values)
        self.give_budget(key, budget)
        return key


class IssuedSerializer(GatewayKeySerializer):
    key = serializers.CharField(read_only=True, help_text="The whole key; it is never shown again.")

    class Meta(GatewayKeySerializer.Meta):
        fields: ClassVar[Any] = (*GatewayKeySerializer.Meta.fields, "key")


class RotationSerializer(KnownFields):
    overlap_seconds = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_OVERLAP_SECONDS,
        help_text="How long the old secret stays good; a day if left out.",
    )


class LifetimeSerializer(KnownFields):
    expires_in = serializers.IntegerField(
        required=False,
        min_value=1,
        max_value=keys.BROWSER_SECONDS,
        help_text="Seconds; as long as possible if left out.",
    )


class BrowserTokenSerializer(serializers.Serializer[Any]):
    token = serializers.CharField(help_text="A bearer token of the data plane; it is never shown again.")
    expires_at = serializers.DateTimeField()


class GatewayKeys(Bulk, Rows):
    """The keys that applications call with. A member sees his own and those of his teams."""

    resource = "gateway_keys"
    # Whoever may give a key a new secret may empty its cache.
    words: ClassVar = {
        "revoke": "revoke",
        "rotate": "rotate",
        "empty_cache": "rotate",
        "browser_token": "lend",
    }
    serializer_class = GatewayKeySerializer
    queryset = GatewayKey.objects.select_related("owner", "team", "use", "budget")
    filterset_fields = ("enabled", "owner__username", "team__name")
    search_fields = ("name", "key_id", "owner__username", "team__name")
    ordering_fields = ("id", "name", "enabled", "expires_at", "created_at", "updated_at")

    def get_queryset(self) -> QuerySet[Any]:
        rows = super().get_queryset()
        if not self.request.user.is_authenticated:
            return rows.none()
        rows = rows.prefetch_related(current_accounts("budget__accounts"))
        if roles.own_only(self.request.user, self.resource, word_of(self)):
            return rows.filter(pk__in=keys_of(self.request.user))
        return rows

    @extend_schema(responses={201: IssuedSerializer})
    def create(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Issue a key. The answer is the only one that shows it."""
        serializer = self.get_serializer(data=request.data)
        with self.changing():
            serializer.is_valid(raise_exception=True)
            key = serializer.save()
        return self.shown(key, 201, key=key.whole)

    @extend_schema(request=None, responses=GatewayKeySerializer)
    @action(detail=True, methods=["post"])
    def revoke(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """End the key for ever, on every worker and every open stream."""
        with self.changing():
            key = self.get_object()
            self.check_version(key)
            if key.revoked_at is None:
                keys.revoke(key)
        return self.shown(key)

    @extend_schema(request=None, responses=GatewayKeySerializer)
    @action(detail=True, methods=["post"], url_path="empty-cache")
    def empty_cache(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Have no answer that was kept until now given again, to this key or another one of its owner."""
        with self.changing():
            key = self.get_object()
            self.check_version(key)
            keys.empty_cache(key)
        return self.shown(key)

    @extend_schema(request=RotationSerializer, responses=IssuedSerializer)
    @action(detail=True, methods=["post"])
    def rotate(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Give the key a new secret; the old one stays good for a while. The answer is the only one that shows it."""
        form = RotationSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        seconds = form.validated_data.get("overlap_seconds")
        overlap = keys.DEFAULT_OVERLAP if seconds is None else timedelta(seconds=seconds)
        with self.changing():
            key = self.get_object()
            self.check_version(key)
            if key.revoked_at is not None:
                raise Conflict("A revoked key stays revoked; issue another one.")
            whole = keys.rotate(key, overlap=overlap)
        return self.shown(key, key=whole)

    @extend_schema(request=LifetimeSerializer, responses=BrowserTokenSerializer)
    @action(detail=True, methods=["post"], url_path="browser-token")
    def browser_token(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """A token for a web page: it stands for the key, with its limits and budget, for at most 15 minutes."""
        form = LifetimeSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        with self.changing() as change:
            key = self.get_object()
            if not key.usable:
                raise Conflict("Only a key that can be used now can be lent.")
            if key.pepper not in settings.PENSTOCK_PEPPERS:
                raise Conflict("Nobody can use this key: PENSTOCK_PEPPERS has its pepper no more. Rotate it.")
            token, until = keys.browser_token(
                key, seconds=form.validated_data.get("expires_in", keys.BROWSER_SECONDS)
            )
            identity = replace(key.audit_identity(), noun="browser_token")
            change.add(verb="issue", identity=identity, changes={"expires_at": [None, until.isoformat()]})
        return Response({"token": token, "expires_at": until}, headers={"Cache-Control": "no-store"})
