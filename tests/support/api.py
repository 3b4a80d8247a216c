"""Talking to the control plane's API as somebody."""

from __future__ import annotations

import re
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from rest_framework.test import APIClient

V1 = "/api/v1"
KEY = "sk-canary-0123456789abcdef"
"""A provider's key that must not turn up in any answer."""


def anybody(**options: Any) -> APIClient:
    """A client without login."""
    # WhiteNoise warns about a missing folder, which `collectstatic` makes in real life.
    settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
    return APIClient(**options)


def as_(user: User) -> APIClient:
    """A client with this user's session."""
    client = anybody()
    client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
    return client


def error(response: Any) -> dict[str, Any]:
    """The error of an answer, which must have the one shape."""
    body = response.json()
    assert set(body) == {"error", "request_id"}
    assert set(body["error"]) == {"code", "message", "details"}
    assert body["request_id"] == response["x-request-id"]
    found: dict[str, Any] = body["error"]
    return found


def add_server(client: APIClient, **fields: Any) -> dict[str, Any]:
    """A server made by a request."""
    body = {"name": "llama", "kind": "llamacpp", "base_url": "http://127.0.0.1:9", **fields}
    response = client.post(f"{V1}/servers", body)
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def add_key(client: APIClient, **fields: Any) -> dict[str, Any]:
    """A vendor's key made by a request."""
    body = {"provider": "openai", "key_name": "team", "api_key": KEY, **fields}
    response = client.post(f"{V1}/api-keys", body)
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def template(route: str) -> str:
    """A route of the URL conf as people write it: `/api/v1/servers/{id}`."""
    text = re.sub(r"\(\?P<(\w+)>(?:[^()]|\([^()]*\))*\)", r"{\1}", route)
    text = text.replace("^", "").replace("\\", "").removesuffix("$").removesuffix("/?")
    return "/" + text.replace("(?:/.*)?", "/*").replace("(?:v1/)?", "").replace("{pk}", "{id}").lstrip("/")
