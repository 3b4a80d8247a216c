"""Cross-origin headers of the data plane, for the origins of `ALLOWED_ORIGINS` and no others. No cookies are ever used here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from django.conf import settings

Pairs = tuple[tuple[bytes, bytes], ...]

EXPOSED = (
    b"x-request-id, x-penstock-provider, x-penstock-model, x-penstock-attempts, x-penstock-config, x-penstock-route, "
    b"x-penstock-cache, retry-after"
)
ACCEPTED = (
    b"authorization",
    b"cache-control",
    b"content-type",
    b"x-api-key",
    b"x-request-id",
    b"x-penstock-resume",
)
MOST_ASKED = 64
ONE_ASKED = re.compile(rb"[a-z0-9-]{1,64}")


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
        (b"access-control-allow-headers", b", ".join(dict.fromkeys((*ACCEPTED, *_asked(scope))))),
        (b"access-control-max-age", b"600"),
        (b"vary", b"Access-Control-Request-Headers"),
    )


def _asked(scope: Mapping[str, Any]) -> list[bytes]:
    """The headers that a page wants to send. SDKs have many of their own, and what we do not read does no harm."""
    value = next(
        (value for name, value in scope["headers"] if name == b"access-control-request-headers"), b""
    )
    names = (name.strip().lower() for name in value.split(b",")[:MOST_ASKED])
    return [name for name in names if ONE_ASKED.fullmatch(name)]
