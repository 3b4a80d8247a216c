"""Everything that Django answers. The data plane's paths are in proxy.endpoints."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path, re_path
from django.views.generic import RedirectView

from audit.api_views import NotHere
from config import sso
from config.api_health import PingView
from config.api_schema import Docs, Schema

urlpatterns = [
    path("", RedirectView.as_view(url="/admin/"), name="start"),
    # APPEND_SLASH is off, since nothing else is to redirect; but this is what people type.
    path("admin", RedirectView.as_view(url="/admin/"), name="admin-without-slash"),
    path("admin/account/sign-on/", sso.start, name="sso_start"),
    path("admin/account/sign-on/link/", admin.site.admin_view(sso.link), name="sso_link"),
    path("admin/account/sign-on/callback/", sso.callback, name="sso_callback"),
    path("admin/account/", include("audit.access.urls")),
    path("admin/", admin.site.urls),
    re_path(r"^ping/?$", PingView.as_view(), name="ping"),
    re_path(r"^api/(?:v1/)?schema/?$", Schema.as_view(), name="schema"),
    re_path(r"^api/(?:v1/)?docs/?$", Docs.as_view(url_name="schema"), name="docs"),
    path("api/v1/llm-config/", include("config.api_v1")),
    path("api/v1/", include("config.api_v1")),
    path("api/", include("config.api_v1")),
    re_path(r"^api(?:/.*)?$", NotHere.as_view(), name="no-such-path"),
]

handler400 = "audit.api_errors.bad_request"
handler403 = "audit.api_errors.permission_denied"
handler404 = "audit.api_errors.not_found"
handler500 = "audit.api_errors.server_error"
