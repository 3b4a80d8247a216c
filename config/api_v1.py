"""The control plane's paths: one router, several mounts (see config.urls)."""

from __future__ import annotations

from django.urls import URLPattern, URLResolver, re_path
from rest_framework.routers import Route, SimpleRouter

from audit.api_log import AuditLog
from audit.api_tokens import ObtainToken, RefreshTokenView, RevokeToken
from config.api_admin import Logs, Stats
from config.api_health import HealthView
from providers.api.active import Active
from providers.api.api_keys import ApiKeys
from providers.api.views import Servers, VendorsAndServers
from proxy.api.backups import Backups
from proxy.api.budgets import Budgets
from proxy.api.gateway_keys import GatewayKeys
from proxy.api.model_routes import ModelRoutes
from proxy.api.owners import OwnersLimits
from proxy.api.prices import Prices
from proxy.api.usage import Usage


class Router(SimpleRouter):
    """Every path answers with and without a trailing slash; nothing redirects."""

    def __init__(self) -> None:
        super().__init__()
        self.trailing_slash = "/?"


class ActiveRouter(Router):
    """`active` is one thing with three parts, so its list takes the POST that sets a part."""

    routes = [
        Route(
            r"^{prefix}{trailing_slash}$", {"get": "overview", "post": "choose"}, "{basename}-list", False, {}
        ),
        Route(
            r"^{prefix}/{lookup}{trailing_slash}$",
            {"get": "retrieve", "put": "update", "patch": "partial_update", "delete": "destroy"},
            "{basename}-detail",
            True,
            {},
        ),
    ]


router = Router()
router.register("servers", Servers, basename="server")
router.register("providers", VendorsAndServers, basename="provider")
router.register("api-keys", ApiKeys, basename="api-key")
router.register("model-routes", ModelRoutes, basename="model-route")
router.register("prices", Prices, basename="price")
router.register("budgets", Budgets, basename="budget")
router.register("gateway-keys", GatewayKeys, basename="gateway-key")
router.register("audit", AuditLog, basename="audit")
router.register("owner-limits", OwnersLimits, basename="owner-limits")
router.register("usage", Usage, basename="usage")
router.register("admin/stats", Stats, basename="admin-stats")
router.register("admin/logs", Logs, basename="admin-logs")
active_router = ActiveRouter()
active_router.register("active", Active, basename="active")

urlpatterns: list[URLPattern | URLResolver] = [
    re_path(r"^health/?$", HealthView.as_view(), name="health"),
    re_path(r"^auth/token/?$", ObtainToken.as_view(), name="token"),
    re_path(r"^auth/token/refresh/?$", RefreshTokenView.as_view(), name="token-refresh"),
    re_path(r"^auth/token/revoke/?$", RevokeToken.as_view(), name="token-revoke"),
    re_path(r"^admin/backup/?$", Backups.as_view({"get": "download", "post": "make"}), name="backup"),
    re_path(r"^admin/providers/restore/?$", Backups.as_view({"post": "restore"}), name="restore"),
    *router.urls,
    *active_router.urls,
]
