"""The usage report: what a period comes to, as a table with bars."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.http import urlencode

from providers.admin.badges import money
from proxy import reports
from proxy.models import UsageHour, UsageRecord

PERIODS = {
    "24h": ("Last 24 hours", timedelta(hours=24)),
    "7d": ("Last 7 days", timedelta(days=7)),
    "30d": ("Last 30 days", timedelta(days=30)),
    "90d": ("Last 90 days", timedelta(days=90)),
    "365d": ("Last 365 days", timedelta(days=365)),
}
GROUPS = {
    "day": "Day",
    "hour": "Hour",
    "key": "Gateway key",
    "owner": "Owner",
    "provider": "Provider",
    "model": "Model",
    "route": "Way",
    "purpose": "Purpose",
    "status": "Status",
}
DEFAULTS = {"period": "30d", "group": "day"}
MOST_LINES = 1000


@dataclass(frozen=True, slots=True)
class Bar:
    """A line of the table. share: per cent of the largest line's cost, or of its tokens where nothing has a price."""

    name: str
    share: float
    line: reports.Line


def report_view(request: HttpRequest) -> HttpResponse:
    """The page, for the `period` and `group` that the address names; what it does not know it takes for the default."""
    if not request.user.has_perm("proxy.view_usagehour"):
        raise PermissionDenied
    period = _chosen(request, "period", PERIODS)
    group = _chosen(request, "group", GROUPS)
    wanted = {"bucket": group} if group in reports.BUCKETS else {"group_by": group}
    since = timezone.now() - PERIODS[period][1]
    report = reports.asked(
        since=since, group_by=(wanted.get("group_by") or "").split(), bucket=wanted.get("bucket")
    )
    sums = reports.seen_by(request.user, UsageHour.objects.all())
    exported = {
        **wanted,
        "since": f"{report.since:%Y-%m-%dT%H:%M:%SZ}",
        "until": f"{report.until:%Y-%m-%dT%H:%M:%SZ}",
    }
    context = {
        **admin.site.each_context(request),
        "title": "Usage report",
        "opts": UsageRecord._meta,
        "periods": [(name, label) for name, (label, _) in PERIODS.items()],
        "groups": GROUPS.items(),
        "period": period,
        "group": group,
        "group_title": GROUPS[group],
        "report": report,
        "totals": shown(reports.totals(sums, report)),
        "csv": f"{reverse('usage-summary')}?{urlencode({**exported, 'format': 'csv'})}",
        **_table(sums, report, group),
    }
    return TemplateResponse(request, "admin/proxy/report.html", context)


def shown(line: reports.Line) -> reports.Line:
    """A line with its cost in dollars and cents, or smaller where it comes to less."""
    return {**line, "cost": cost_of(line)}


def cost_of(line: reports.Line) -> str:
    if line["unpriced"] and line["unpriced"] == line["attempts"]:
        return "unknown"
    return money(float(line["cost_usd"]))


def _chosen(request: HttpRequest, name: str, known: Iterable[str]) -> str:
    value = request.GET.get(name, "")
    return value if value in known else DEFAULTS[name]


def _table(sums: Any, report: reports.Asked, group: str) -> dict[str, Any]:
    """The bars, or that there would be more than anybody reads."""
    try:
        found = reports.lines(sums, report, most=MOST_LINES)
    except reports.TooManyLines:
        return {"bars": [], "too_many": MOST_LINES}
    if report.bucket:
        found.reverse()
    measure = "cost_usd" if any(float(line["cost_usd"]) for line in found) else "total_tokens"
    largest = max((float(line[measure]) for line in found), default=0) or 1
    bars = [Bar(_name(line, group), 100 * float(line[measure]) / largest, shown(line)) for line in found]
    return {"bars": bars, "measured_by_cost": measure == "cost_usd"}


def _name(line: reports.Line, group: str) -> str:
    if group in reports.BUCKETS:
        return f"{line['bucket']:%Y-%m-%d}" if group == "day" else f"{line['bucket']:%Y-%m-%d %H}:00"
    return str(line[group] or "(none)").replace("_", " ")
