"""Cross-origin headers of the data plane, for the origins of `ALLOWED_ORIGINS` and no others. No cookies are ever used here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.conf import settings

Pairs = tuple[tuple[bytes, bytes], ...]

EXPOSED = (
    b"x-request-id, x-penstock-provider, x-penstock-model, x-penstock-attempts, x-penstock-config, x-penstock-route, "
    b"x-penstock-cache, retry-after"
)


def cors_headers(scope: Mapping[str, Any]) -> Pairs:
    """What an answer says to a browser; nothing to an origin that is not allowed."""
    allowed = settings.ALLOWED_ORIGINS
    if not allowed:
        return ()
    vary = (b"vary", b"Origin")
    origin = next((value for name, value in scope["headers"] if name == b"origin"), b"")
    if origin.decode("latin-1") not in allowed:
        return (vary,)
    return (vary, (b"access-control-allow-origin", origin), (b"access-control-expose-headers", EXPOSED))


def preflight(scope: Mapping[str, Any]) -> Pairs:
    """What an OPTIONS request is answered beyond `cors_headers`."""
    if not any(name == b"access-control-allow-origin" for name, _ in cors_headers(scope)):
        return ((b"allow", b"GET, POST, OPTIONS"),)
    return (
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (
            b"access-control-allow-headers",
            b"authorization, cache-control, content-type, x-api-key, x-request-id, x-penstock-resume",
        ),
        (b"access-control-max-age", b"600"),
    )
