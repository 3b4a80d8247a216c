"""Trying a provider or a key out: the question goes over the network, so never inside a change or a transaction."""

from __future__ import annotations

import dataclasses
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.utils import timezone
from rest_framework import serializers

from providers import keyring
from providers.health import probe_credential, record, test_endpoint
from providers.models import ApiKey, Provider, Status
from providers.wire import Credential, Reading


class TrialSerializer(serializers.Serializer[Any]):
    """What a test saw. `status` is `online` for an answer that makes sense, else what went wrong."""

    status = serializers.ChoiceField(Status.choices)
    status_code = serializers.IntegerField(allow_null=True)
    latency_ms = serializers.FloatField(allow_null=True)
    detail = serializers.CharField(allow_null=True)
    models = serializers.ListField(
        child=serializers.CharField(), help_text="Names; empty when none are listed."
    )


class KeyTrialSerializer(TrialSerializer):
    valid = serializers.BooleanField(
        allow_null=True, help_text="Whether the provider takes the key; null when it could not be asked."
    )


def try_out(provider: Provider, credential: Credential | None) -> dict[str, Any]:
    """Ask the provider the cheapest question its kind has, for at most TEST_TIMEOUT_SECONDS."""
    keyring.load_if_changed()
    result = async_to_sync(test_endpoint)(
        provider.endpoint(), credential, timeout=settings.TEST_TIMEOUT_SECONDS
    )
    return {**dataclasses.asdict(result), "detail": result.detail or None}


def try_stored(provider: Provider) -> dict[str, Any]:
    """Ask with the provider's own key. What was seen counts like a probe, so that `last_tested_at` is true."""
    began = timezone.now()
    seen = try_out(provider, probe_credential(provider))
    reading = Reading(seen["status"], seen["status_code"], seen["detail"] or "", seen["latency_ms"])
    record(provider.pk, reading, now=began)
    return seen


def try_key(key: ApiKey) -> dict[str, Any]:
    """Ask with this one key, and say whether the provider takes it."""
    seen = try_out(key.provider, key.credential())
    if seen["status"] == "online":
        return {**seen, "valid": True}
    return {**seen, "valid": False if seen["status_code"] in {401, 403} else None}
