"""Trying a provider or a key out: the question goes over the network, so never inside a change or a transaction."""

from __future__ import annotations

import dataclasses
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from rest_framework import serializers

from providers.api.values import ModelSerializer
from providers.health import test_endpoint
from providers.models import ApiKey, Provider, ProviderHealth
from providers.wire import Credential


class TrialSerializer(serializers.Serializer[Any]):
    """What a test saw. `status` is `online` for an answer that makes sense, else what went wrong."""

    status = serializers.ChoiceField(ProviderHealth.status.field.choices)  # type: ignore[attr-defined]
    status_code = serializers.IntegerField(allow_null=True)
    latency_ms = serializers.FloatField(allow_null=True)
    detail = serializers.CharField(allow_null=True)
    models = ModelSerializer(many=True)


class KeyTrialSerializer(TrialSerializer):
    valid = serializers.BooleanField(
        allow_null=True, help_text="Whether the provider takes the key; null when it could not be asked."
    )


def try_out(provider: Provider, credential: Credential | None) -> dict[str, Any]:
    """Ask the provider the cheapest question its kind has, for at most TEST_TIMEOUT_SECONDS."""
    result = async_to_sync(test_endpoint)(
        provider.endpoint(), credential, timeout=settings.TEST_TIMEOUT_SECONDS
    )
    return {
        "status": str(result.status),
        "status_code": result.status_code,
        "latency_ms": result.latency_ms,
        "detail": result.detail or None,
        "models": [dataclasses.asdict(model) for model in result.models],
    }


def try_key(key: ApiKey) -> dict[str, Any]:
    seen = try_out(key.provider, key.credential())
    if seen["status"] == "online":
        return {**seen, "valid": True}
    return {**seen, "valid": False if seen["status_code"] in {401, 403} else None}


def credential_of(provider: Provider) -> Credential | None:
    """The key that a test uses: the default, else the first that is enabled."""
    enabled = sorted(
        (key for key in provider.keys.all() if key.enabled), key=lambda key: (not key.is_default, key.pk)
    )
    return enabled[0].credential() if enabled else None
