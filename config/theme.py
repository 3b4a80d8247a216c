"""How the admin looks, and the order of its menu: the order in which a newcomer needs the pages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse_lazy


def _may_see(model: str) -> Callable[[HttpRequest], bool]:
    app, name = model.split(".")

    def permitted(request: HttpRequest) -> bool:
        return request.user.has_perm(f"{app}.view_{name}") or request.user.has_perm(f"{app}.change_{name}")

    return permitted


def _may_back_up(request: HttpRequest) -> bool:
    # The settings import this module before there are models.
    from audit.roles import may

    return may(request.user, "backups", "read")


def _page(title: str, icon: str, model: str) -> dict[str, Any]:
    return {
        "title": title,
        "icon": icon,
        "link": reverse_lazy(f"admin:{model.replace('.', '_')}_changelist"),
        "permission": _may_see(model),
    }


UNFOLD: dict[str, Any] = {
    "SITE_TITLE": "Penstock",
    "SITE_HEADER": "Penstock",
    "SITE_SUBHEADER": "LLM gateway",
    "SITE_SYMBOL": "water",
    "SITE_URL": None,
    "SHOW_VIEW_ON_SITE": False,
    "SHOW_BACK_BUTTON": False,
    "BORDER_RADIUS": "8px",
    "DASHBOARD_CALLBACK": "proxy.admin.start.context",
    "STYLES": [lambda request: static("admin/css/penstock.css")],
    "SCRIPTS": [lambda request: static("admin/js/penstock.js")],
    "SITE_FAVICONS": [
        {"rel": "icon", "type": "image/svg+xml", "href": lambda request: static("admin/penstock.svg")}
    ],
    "ACCOUNT": {
        "navigation": [
            {"title": "Second factor", "link": reverse_lazy("mfa_index")},
            {"title": "Change password", "link": reverse_lazy("admin:password_change")},
        ]
    },
    "COLORS": {
        "primary": {
            "50": "oklch(97.5% .015 220)",
            "100": "oklch(94.5% .032 220)",
            "200": "oklch(89.5% .06 220)",
            "300": "oklch(82.5% .095 220)",
            "400": "oklch(73% .12 222)",
            "500": "oklch(62% .12 225)",
            "600": "oklch(52% .11 228)",
            "700": "oklch(45% .095 230)",
            "800": "oklch(39.5% .08 232)",
            "900": "oklch(34.5% .065 234)",
            "950": "oklch(26% .05 236)",
        },
    },
    "SIDEBAR": {
        "show_search": False,
        "command_search": False,
        "show_all_applications": False,
        "navigation": [
            {"items": [{"title": "Start", "icon": "home", "link": reverse_lazy("admin:index")}]},
            {
                "title": "1 · Connect",
                "items": [
                    _page("Servers", "dns", "providers.server"),
                    _page("Providers", "cloud", "providers.provider"),
                    _page("API keys", "key", "providers.apikey"),
                    _page("Models", "deployed_code", "providers.upstreammodel"),
                ],
            },
            {
                "title": "2 · Choose",
                "items": [
                    _page("Active provider", "alt_route", "providers.activeprovider"),
                    _page("Model routes", "fork_right", "proxy.modelroute"),
                ],
            },
            {
                "title": "3 · Give access",
                "items": [
                    _page("Gateway keys", "vpn_key", "proxy.gatewaykey"),
                    _page("Limits of owners", "speed", "proxy.ownerlimits"),
                    _page("Budgets", "savings", "proxy.budget"),
                ],
            },
            {
                "title": "Observe",
                "separator": True,
                "items": [
                    {
                        "title": "Usage report",
                        "icon": "bar_chart",
                        "link": reverse_lazy("admin:proxy_usagerecord_report"),
                        "permission": _may_see("proxy.usagehour"),
                    },
                    _page("Usage", "receipt_long", "proxy.usagerecord"),
                    _page("Prices", "payments", "proxy.modelprice"),
                    _page("Health checks", "monitor_heart", "providers.healthcheck"),
                    _page("Audit log", "history", "audit.entry"),
                ],
            },
            {
                "title": "Administration",
                "separator": True,
                "items": [
                    _page("Users", "person", "auth.user"),
                    _page("Roles and teams", "group", "auth.group"),
                    {
                        "title": "Backup",
                        "icon": "backup",
                        "link": reverse_lazy("admin:backup"),
                        "permission": _may_back_up,
                    },
                ],
            },
        ],
    },
}
