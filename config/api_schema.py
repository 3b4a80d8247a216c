"""The schema of both planes, and the page that shows it.

What is answered is the committed openapi.yaml, of which CI knows that it is what the code says: making it takes seconds of a
processor that streams need.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import orjson
import yaml
from django.conf import settings
from django.http import HttpResponse
from drf_spectacular.utils import extend_schema
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView
from rest_framework.request import Request


class Schema(SpectacularAPIView):
    """As YAML, or as JSON where the caller accepts nothing else or asks with `?format=json`."""

    @extend_schema(exclude=True)
    def get(self, request: Request, *args: Any, **kwargs: Any) -> HttpResponse:
        chosen = request.accepted_renderer
        return HttpResponse(
            committed(chosen.format),
            content_type=chosen.media_type,
            headers={"Content-Disposition": f'inline; filename="Penstock.{chosen.format}"'},
        )


class Docs(SpectacularSwaggerSplitView):
    """A page to read; REST framework's answer to OPTIONS has no place in its template."""

    http_method_names = ["get", "head"]


@functools.cache
def committed(form: str) -> bytes:
    """The schema as "yaml" or "json"."""
    text = (Path(settings.BASE_DIR) / "openapi.yaml").read_bytes()
    return orjson.dumps(yaml.load(text, yaml.CSafeLoader)) if form == "json" else text
