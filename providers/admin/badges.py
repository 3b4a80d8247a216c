"""How a provider feels, in a word, a colour and an age."""

from __future__ import annotations

from datetime import datetime

from django.conf import settings
from django.utils import timezone
from django.utils.html import format_html
from django.utils.safestring import SafeString

from providers.models import Provider, ProviderHealth, Verdict

COLOURS = {
    Verdict.HEALTHY: "good",
    Verdict.DEGRADED: "warn",
    Verdict.DOWN: "bad",
    Verdict.UNKNOWN: "plain",
}


def badge(text: str, colour: str = "plain", title: str = "") -> SafeString:
    """colour: good, warn, bad, info or plain; it never says more than the text does."""
    return format_html('<span class="ps-badge ps-{}" title="{}">{}</span>', colour, title, text)


def age(moment: datetime | None) -> str:
    """How long ago, in one rough unit: "12 s", "4 min", "3 h", "9 days"."""
    if moment is None:
        return "never"
    seconds = max(0, int((timezone.now() - moment).total_seconds()))
    for limit, unit, name in ((120, 1, "s"), (7200, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds // unit} {name}"
    return f"{seconds // 86400} days"


def ago(moment: datetime | None) -> str:
    return "never" if moment is None else f"{age(moment)} ago"


def health_of(provider: Provider) -> ProviderHealth | None:
    return getattr(provider, "health", None)


def health_badge(provider: Provider) -> SafeString:
    """ "healthy, 12 s ago", or what a person decided, or that the provider is switched off."""
    health = health_of(provider)
    if not provider.enabled:
        return badge("off", "plain", "This provider is disabled and gets no requests.")
    if health is not None and health.override is not None:
        if health.override:
            return badge("put in by hand", "info", "Used whatever the probes say.")
        return badge("taken out by hand", "bad", "Not used whatever the probes say.")
    if health is None or health.last_checked_at is None:
        return badge("not checked yet", "plain")
    colour = COLOURS[Verdict(health.health_status)]
    stale = (timezone.now() - health.last_checked_at).total_seconds() > 3 * _interval(provider) + 30
    text = f"{health.get_health_status_display().lower()}, {ago(health.last_checked_at)}"
    return badge(text, "plain" if stale and colour == "good" else colour, health.detail[:300])


def _interval(provider: Provider) -> float:
    return provider.probe_interval_seconds or float(settings.HEALTH_CHECK_INTERVAL_SECONDS)


def counted(row: object, name: str) -> str:
    """A counter of the row of use that belongs to a key or provider, which has none before its first use."""
    return f"{getattr(getattr(row, 'use', None), name, 0):,}"


def spent(row: object) -> str:
    """What the attempts of a key or provider whose price is known have cost."""
    return money(getattr(getattr(row, "use", None), "cost_nanodollars", 0) / 1e9)


def money(dollars: float) -> str:
    """In dollars and cents, or as much of a cent as it is."""
    return f"${dollars:,.2f}" if dollars >= 1 or not dollars else f"${dollars:.6f}"
