"""Gateway keys: issued, limited, rotated and revoked. The key itself is answered once, when it is made."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any, ClassVar

from django.contrib.auth import get_user_model
from django.db.models.query import QuerySet
from drf_spectacular.utils import extend_schema, extend_schema_field
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit import roles
from audit.api_errors import Conflict
from audit.api_views import KnownFields, Rows, StrictSerializer, word_of
from proxy import keys
from proxy.models import GatewayKey, GatewayKeyUse

MAX_OVERLAP_SECONDS = 30 * 24 * 3600


@extend_schema_field(
    {"type": ["string", "null"], "description": "A user name; the user's id is accepted too."}
)
class OwnerField(serializers.Field[Any, Any, Any, Any]):
    def to_representation(self, value: Any) -> str:
        return str(value.get_username())

    def to_internal_value(self, data: Any) -> Any:
        users = get_user_model().objects.filter(is_active=True)
        if isinstance(data, str) and "\0" not in data:
            found = users.filter(username=data).first()
        elif isinstance(data, int) and not isinstance(data, bool) and 0 < data < 2**63:
            found = users.filter(pk=data).first()
        else:
            found = None
        if found is None:
            raise serializers.ValidationError("There is no such user.")
        return found


class GatewayKeySerializer(StrictSerializer[GatewayKey]):
    aliases: ClassVar = {"is_active": "enabled"}
    volatile: ClassVar = frozenset({"requests_count", "last_used_at", "updated_at"})

    owner = OwnerField(required=False, allow_null=True)
    is_active = serializers.BooleanField(
        source="enabled", required=False, help_text="Another name of `enabled`."
    )
    prefix = serializers.CharField(read_only=True)
    requests_count = serializers.IntegerField(source="use.requests_count", read_only=True)
    last_used_at = serializers.DateTimeField(source="use.last_used_at", read_only=True, allow_null=True)

    class Meta:
        model = GatewayKey
        fields: ClassVar[Any] = (
            "id", "name", "owner", "enabled", "is_active", "prefix", "last4", "requests_per_minute", "tokens_per_minute",
            "max_concurrency", "allowed_models", "allowed_networks", "resume_streams", "expires_at", "revoked_at", "requests_count",
            "last_used_at", "created_by", "created_at", "updated_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = ("last4", "revoked_at", "created_by")
        validators: ClassVar[list[Any]] = []
        extra_kwargs: ClassVar[Any] = {
            "max_concurrency": {
                "help_text": "Null: no limit. Left out of a new key: DEFAULT_MAX_CONCURRENCY, 50 unless set otherwise."
            }
        }

    def to_representation(self, key: GatewayKey) -> dict[str, Any]:
        if not hasattr(key, "use"):
            # Never used: the row's defaults, which this makes the key's without storing them.
            GatewayKeyUse(gateway_key=key)
        return super().to_representation(key)

    def create(self, values: dict[str, Any]) -> GatewayKey:
        values.setdefault("max_concurrency", keys.default_concurrency())
        key = GatewayKey(**values, created_by=self.user.get_username())
        # Lives only on this object, for the one answer that shows it.
        key.whole = keys.give_secret(key)  # type: ignore[attr-defined]
        key.full_clean()
        key.save()
        return key

    def update(self, key: GatewayKey, values: dict[str, Any]) -> GatewayKey:
        if key.revoked_at is not None and values.get("enabled"):
            raise Conflict("A revoked key stays revoked; issue another one.")
        return super().update(key, values)


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


class GatewayKeys(Rows):
    """The keys that applications call with. A member sees his own."""

    resource = "gateway_keys"
    words: ClassVar = {"revoke": "revoke", "rotate": "rotate", "browser_token": "lend"}
    serializer_class = GatewayKeySerializer
    queryset = GatewayKey.objects.select_related("owner", "use")
    filterset_fields = ("enabled", "owner__username")
    search_fields = ("name", "key_id", "owner__username")
    ordering_fields = ("id", "name", "enabled", "expires_at", "created_at", "updated_at")

    def get_queryset(self) -> QuerySet[Any]:
        rows = super().get_queryset()
        if not self.request.user.is_authenticated:
            return rows.none()
        if roles.own_only(self.request.user, self.resource, word_of(self)):
            return rows.filter(owner=self.request.user)
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
            token, until = keys.browser_token(
                key, seconds=form.validated_data.get("expires_in", keys.BROWSER_SECONDS)
            )
            identity = replace(key.audit_identity(), noun="browser_token")
            change.add(verb="issue", identity=identity, changes={"expires_at": [None, until.isoformat()]})
        return Response({"token": token, "expires_at": until}, headers={"Cache-Control": "no-store"})
