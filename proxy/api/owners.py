"""Owners as the API writes them, and what all keys of one may do together."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib.auth.models import User
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers

from audit.api_views import Rows, StrictSerializer
from providers.models.limited import LIMITS
from proxy import owners
from proxy.models import OwnerLimits


@extend_schema_field(
    {
        "type": "string",
        "description": "A user name, or `team:` and the name of a team; a user's id is accepted too.",
        "examples": ["alice", "team:ml"],
    }
)
class OwnerField(serializers.Field[Any, Any, Any, Any]):
    def to_representation(self, value: Any) -> str:
        return owners.text_of(value)

    def to_internal_value(self, data: Any) -> Any:
        found: Any = None
        if isinstance(data, str):
            found = owners.find(data)
        elif isinstance(data, int) and not isinstance(data, bool) and 0 < data < 2**63:
            found = User.objects.filter(is_active=True, pk=data).first()
        if found is None:
            raise serializers.ValidationError("There is no such user or team.")
        return found


class OwnerLimitsSerializer(StrictSerializer[OwnerLimits]):
    volatile: ClassVar = frozenset({"updated_at"})

    owner = OwnerField(source="holder")

    class Meta:
        model = OwnerLimits
        fields: ClassVar[Any] = ("id", "owner", *LIMITS, "created_by", "created_at", "updated_at")
        read_only_fields: ClassVar[Any] = ("created_by",)
        validators: ClassVar[list[Any]] = []

    def validate_owner(self, found: Any) -> Any:
        if self.instance is not None and found != self.instance.holder:
            raise serializers.ValidationError("Limits stay with their owner; add them to the other one anew.")
        if self.instance is None and hasattr(found, "owner_limits"):
            raise serializers.ValidationError("This owner has limits already.")
        return found

    def create(self, values: dict[str, Any]) -> OwnerLimits:
        limits = OwnerLimits(**values, created_by=self.user.get_username())
        limits.full_clean()
        limits.save()
        return limits


class OwnersLimits(Rows):
    """Limits that all keys of a user or of a team share, beside those that each key has."""

    resource = "owner_limits"
    serializer_class = OwnerLimitsSerializer
    queryset = OwnerLimits.objects.select_related("owner", "team")
    filterset_fields = ("owner__username", "team__name")
    search_fields = ("owner__username", "team__name")
    ordering_fields = ("id", "created_at", "updated_at")
