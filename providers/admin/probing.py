"""What the pages ask of providers.health and providers.catalog, shaped for them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from asgiref.sync import async_to_sync
from django.conf import settings
from django.http import HttpRequest
from django.utils import timezone

from audit.api_errors import ip_of, request_id_of
from providers import keyring
from providers.catalog import refresh_models
from providers.health import TestResult, probe_credential, record, test_endpoint
from providers.models import Provider
from providers.wire import Reading

AT_ONCE = 10
"""How many are tested by one click; all at the same time, so that it takes no longer than the slowest."""


def test_all(providers: Sequence[Provider]) -> list[TestResult]:
    """Ask each the cheapest question its kind has, with its default key; in order. Dials, outside any change.

    What was seen counts as a probe, so that health is up to date at once.
    """
    keyring.load_if_changed()
    began = timezone.now()
    questions = [(provider.endpoint(), probe_credential(provider)) for provider in providers]

    async def ask() -> list[TestResult]:
        timeout = settings.TEST_TIMEOUT_SECONDS
        return await asyncio.gather(*(test_endpoint(*question, timeout=timeout) for question in questions))

    results = async_to_sync(ask)()
    for provider, seen in zip(providers, results, strict=True):
        record(provider.pk, Reading(seen.status, seen.status_code, seen.detail, seen.latency_ms), now=began)
    return results


def in_one_line(result: TestResult) -> str:
    """A result as the list shows it: "online · HTTP 200 · 12 ms · 3 models"."""
    parts = [str(result.status)]
    if result.status_code is not None:
        parts.append(f"HTTP {result.status_code}")
    if result.latency_ms is not None:
        parts.append(f"{result.latency_ms:.0f} ms")
    if result.models:
        parts.append(f"{len(result.models)} model{'' if len(result.models) == 1 else 's'}")
    if result.detail:
        parts.append(result.detail[:300])
    return " · ".join(parts)


def discover(provider: Provider, request: HttpRequest) -> str:
    """Ask `provider` for its models and keep them; what came of it, in a sentence. Raises ProviderError."""
    found = refresh_models(
        provider,
        actor=request.user,
        via="admin",
        ip=ip_of(request),
        request_id=request_id_of(request),
    )
    if not found.models:
        return f"{provider.name} lists no models."
    changes = [
        f"{len(names)} {word}" for names, word in ((found.added, "new"), (found.removed, "gone")) if names
    ]
    return f"{provider.name} lists {len(found.models)} models: {', '.join(changes) or 'nothing new'}."
