"""The start page: what is wrong now, and what a new installation still needs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import redis
from django.conf import settings
from django.db.models import Exists, OuterRef, Q
from django.http import HttpRequest
from django.urls import reverse
from django.utils import timezone

from providers.adapters import SELF_HOSTED
from providers.admin.badges import age, health_of
from providers.models import ActiveProvider, ApiKey, Provider, ProviderHealth, Purpose, Status
from proxy import prices, reports, weather
from proxy.admin.report import shown
from proxy.models import GatewayKey, PriceList, UsageHour, UsageRecord

BEAT_LATE_SECONDS = 60
BUILT_IN = "echo"
UNPRICED_WITHIN = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Problem:
    title: str
    detail: str
    link: str = ""
    grave: bool = True


@dataclass(frozen=True, slots=True)
class Step:
    title: str
    hint: str
    link: str
    link_text: str
    done: bool
    more_link: str = ""
    more_text: str = ""


def context(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """What the start page shows, added to the theme's context; only to those who may see providers."""
    if not request.user.has_perm("providers.view_provider"):
        return context
    steps = getting_started()
    missing = [step for step in steps if not step.done]
    found = problems()
    enabled = Provider.objects.filter(enabled=True).count()
    return {
        **context,
        "title": "Start",
        "problems": found,
        "grave_problems": [problem for problem in found if problem.grave],
        "mild_problems": [problem for problem in found if not problem.grave],
        "steps": steps,
        "all_done": not missing,
        "next_step": missing[0] if missing else None,
        "enabled_count": enabled,
        "base_url": f"{settings.PUBLIC_URL}/v1",
        "usage": usage_of_a_day(request),
    }


def usage_of_a_day(request: HttpRequest) -> reports.Line | None:
    """What the last 24 hours come to; only for those who may see usage."""
    if not request.user.has_perm("proxy.view_usagehour"):
        return None
    report = reports.asked(since=timezone.now() - timedelta(hours=24))
    return shown(reports.totals(UsageHour.objects.all(), report))


def getting_started() -> list[Step]:
    """The way to the first answer, each step ticked by what the database says."""
    has_key = Exists(ApiKey.objects.filter(provider=OuterRef("pk"), enabled=True))
    connected = (
        Provider.objects.filter(enabled=True).filter(Q(kind__in=SELF_HOSTED) | has_key).exclude(kind=BUILT_IN)
    )
    online = ProviderHealth.objects.filter(provider__in=connected, status=Status.ONLINE)
    tested_link = connected.first()
    return [
        Step(
            "Connect a model provider",
            "A server you run (vLLM, Ollama, llama.cpp), or a vendor whose API key you have.",
            reverse("admin:providers_server_add"),
            "Add a server",
            connected.exists(),
            reverse("admin:providers_provider_changelist"),
            "Use a vendor",
        ),
        Step(
            "See that it answers",
            "Test asks it for its models. It never costs a completion.",
            change_link(tested_link) if tested_link else reverse("admin:providers_server_changelist"),
            "Test it",
            online.exists(),
        ),
        Step(
            "Make it the active chat provider",
            "Requests that name no model go there, and to its fallbacks when it is down. Model routes share requests among several.",
            reverse("admin:providers_activeprovider_change", args=[Purpose.CHAT]),
            "Choose",
            ActiveProvider.objects.filter(purpose=Purpose.CHAT).exists(),
        ),
        Step(
            "Issue a gateway key",
            "What an application uses to call us. It is shown once.",
            reverse("admin:proxy_gatewaykey_add"),
            "Issue a key",
            GatewayKey.objects.filter(revoked_at=None).exists(),
        ),
        Step(
            "Send the first request",
            "With any OpenAI client: set its base URL and the gateway key.",
            reverse("admin:proxy_usagerecord_changelist"),
            "See usage",
            UsageRecord.objects.exists(),
        ),
    ]


def problems() -> list[Problem]:
    """What needs somebody now, the gravest first."""
    return [
        *providers_in_trouble(),
        *scheduler_late(),
        *limits_alone(),
        *price_list_broken(),
        *prices_unknown(),
    ]


def providers_in_trouble() -> list[Problem]:
    troubled = Provider.objects.filter(enabled=True, health__is_healthy=False) | Provider.objects.filter(
        enabled=True, health__consecutive_failures__gt=0
    )
    found = [
        _trouble(provider)
        for provider in troubled.select_related("health").order_by("health__is_healthy", "id")
    ]
    return sorted(found, key=lambda problem: not problem.grave)


def _trouble(provider: Provider) -> Problem:
    health = health_of(provider)
    assert health is not None
    since = f" for {age(health.changed_at)}" if health.changed_at else ""
    if health.override is False:
        detail = "It gets no requests until somebody lets the probes decide again."
        return Problem(f"{provider.name} is taken out by hand{since}", detail, change_link(provider))
    reason = health.detail or str(health.get_status_display())
    if health.is_healthy:
        title = f"{provider.name} is failing ({health.consecutive_failures} in a row)"
        return Problem(title, reason, change_link(provider), grave=False)
    return Problem(f"{provider.name} is down{since}", reason, change_link(provider))


def scheduler_late() -> list[Problem]:
    if not settings.HEALTH_CHECK_ENABLED:
        return [Problem("Health checks are switched off", "HEALTH_CHECK_ENABLED is false.", grave=False)]
    tick = weather.read().beat_tick
    if tick is None:
        return [
            Problem(
                "The scheduler has not run yet", "Are the beat and worker processes running?", grave=False
            )
        ]
    late = time.time() - tick
    if late <= BEAT_LATE_SECONDS:
        return []
    detail = f"Its last sign was {late:.0f} s ago, so health is not up to date. Are beat and worker running?"
    return [Problem("The scheduler is late", detail)]


def limits_alone() -> list[Problem]:
    """Whether rate limits are shared between processes, which takes Redis."""
    if not settings.REDIS_URL:
        return [Problem("Rate limits are kept by each process alone", "REDIS_URL is not set.", grave=False)]
    client = redis.Redis.from_url(settings.REDIS_URL, socket_timeout=0.2, socket_connect_timeout=0.2)
    try:
        client.ping()
    except redis.RedisError:
        return [Problem("Redis does not answer", "Until it does, each process keeps rate limits alone.")]
    finally:
        client.close()
    return []


def price_list_broken() -> list[Problem]:
    broken = PriceList.objects.exclude(problem="").first()
    if broken is None:
        return []
    title = "The price list cannot be used, so prices stay as they were"
    return [Problem(title, broken.problem, reverse("admin:proxy_modelprice_changelist"))]


def prices_unknown() -> list[Problem]:
    """What was answered within a day and could not be billed."""
    found = prices.unpriced(timezone.now() - UNPRICED_WITHIN)
    if not found.requests:
        return []
    title = (
        f"{found.requests} answer{'s' if found.requests > 1 else ''} of {found.models} "
        f"model{'s' if found.models > 1 else ''} had no known price"
    )
    link = f"{reverse('admin:proxy_usagerecord_changelist')}?price=unknown"
    detail = "In the last 24 hours. They count as unknown and not as free; Prices is where one can be written down."
    return [Problem(title, detail, link, grave=False)]


def change_link(provider: Provider) -> str:
    model = "server" if provider.self_hosted else "provider"
    return reverse(f"admin:providers_{model}_change", args=[provider.pk])
