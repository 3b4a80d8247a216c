"""Rows whose every text is hostile, as somebody who may write names could make them."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from django.utils import timezone

from audit.changes import changes
from providers import keys as provider_keys
from providers.models import ApiKey, HealthCheck, Provider, ProviderHealth, UpstreamModel
from proxy import keys, prices
from proxy.models import GatewayKey, ModelPrice, ModelRoute, RouteNode, UsageHour, UsageRecord


def fill(texts: Sequence[str]) -> None:
    with changes(actor=None, via="system"):
        for number, text in enumerate(texts):
            provider = Provider.objects.create(
                name=text,
                slug=f"hostile-{number}",
                kind="vllm",
                base_url=f"http://localhost:{9000 + number}",
                model_path=text,
                metadata={text: text},
            )
            provider_keys.add(ApiKey(provider=provider, name=text), "sk-hostile-12345678")
            UpstreamModel.objects.create(provider=provider, name=text, capabilities=[text])
            key = GatewayKey(name=text, allowed_models=[text])
            keys.give_secret(key)
            key.save()
            # A slash cannot be in the name of a route.
            route = ModelRoute.objects.create(
                name=text.replace("/", "|"), mode="specific", config={text: text}
            )
            RouteNode.objects.create(route=route, position=0, provider=provider, models=[text])
            prices.add_override(ModelPrice(model=text, note=text, prompt=1, completion=1), provider)
            _history(provider, text)


def _history(provider: Provider, text: str) -> None:
    now = timezone.now()
    ProviderHealth.objects.create(
        provider=provider,
        health_status="down",
        is_healthy=False,
        detail=text,
        last_checked_at=now,
        changed_at=now,
    )
    HealthCheck.objects.create(provider=provider, status="error", detail=text)
    UsageRecord.objects.create(
        id=uuid.uuid4(),
        request_id=text,
        created_at=now,
        gateway_key=text,
        owner=text,
        provider=text,
        requested_model=text,
        model=text,
        status="error",
        error_code=text,
        trace={
            "candidates": [text, f"{text}: {text}"],
            "attempts": [_attempt(text)],
            "usage_invalid": [text],
        },
    )

    UsageHour.objects.create(
        id=uuid.uuid4(), hour=now, gateway_key=text, owner=text, provider=text, model=text, attempts=1
    )


def _attempt(text: str) -> dict[str, str]:
    names = ("to", "key", "outcome", "queue", "connect", "first_token", "total")
    return dict.fromkeys(names, text)
