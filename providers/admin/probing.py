"""What the pages ask of providers.health, shaped for them."""

from __future__ import annotations

from dataclasses import dataclass, field

from asgiref.sync import async_to_sync
from django.conf import settings

from providers.models import Provider

AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class Result:
    """What a test saw. latency_ms is None when nothing answered."""

    status: str
    status_code: int | None = None
    latency_ms: float | None = None
    detail: str = ""
    models: list[str] = field(default_factory=list)

    @property
    def online(self) -> bool:
        return self.status == "online"

    @property
    def line(self) -> str:
        """The result in one line, for the list."""
        parts = [self.status]
        if self.status_code is not None:
            parts.append(f"HTTP {self.status_code}")
        if self.latency_ms is not None:
            parts.append(f"{self.latency_ms:.0f} ms")
        if self.models:
            parts.append(f"{len(self.models)} models")
        if self.detail:
            parts.append(self.detail[:300])
        return " · ".join(parts)


def test(provider: Provider) -> Result:
    """Ask `provider` the cheapest question its kind has, with its default key. Dials; saves nothing."""
    from providers.health import test_endpoint

    key = provider.keys.filter(enabled=True).order_by("-is_default", "pk").first()
    credential = key.credential() if key is not None else None
    seen = async_to_sync(test_endpoint)(
        provider.endpoint(), credential, timeout=settings.TEST_TIMEOUT_SECONDS
    )
    return Result(
        status=str(seen.status),
        status_code=seen.status_code,
        latency_ms=seen.latency_ms,
        detail=seen.detail,
        models=[model.id for model in seen.models],
    )


def discover(provider: Provider) -> str:
    """Ask `provider` for its models and save them; what came of it, in a sentence. Raises ProviderError."""
    from providers.catalog import refresh_models

    before = provider.upstream_models.count()
    async_to_sync(refresh_models)(provider)
    after = provider.upstream_models.count()
    return f"{provider.name} has {after} models ({after - before} new)."


def override(provider: Provider, decision: bool | None) -> None:
    """Put the provider in or take it out by hand, or let the probes decide. Inside `audit.changes`."""
    from providers.health import set_override

    set_override(provider, decision)
