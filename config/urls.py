"""Everything that Django answers. The data plane's paths are in proxy.endpoints."""

from __future__ import annotations

from django.contrib import admin
from django.urls import include, path
from django.views.generic import RedirectView

urlpatterns = [
    path("", RedirectView.as_view(url="/admin/"), name="start"),
    path("admin/", admin.site.urls),
    path("api/v1/", include("config.api_v1")),
]
