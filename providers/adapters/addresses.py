"""Where the endpoints of a provider are, from the base URL that somebody typed in."""

from __future__ import annotations

from urllib.parse import urlsplit

from providers.wire import Endpoint


def vendor_api(endpoint: Endpoint) -> str:
    """A vendor's base URL is the base of its API."""
    return endpoint.base_url.rstrip("/")


def self_hosted_api(endpoint: Endpoint) -> str:
    """`http://host:port` and `http://host:port/v1` both mean the latter; any other path is taken as it is."""
    base = endpoint.base_url.rstrip("/")
    return base if urlsplit(base).path else f"{base}/v1"


def native_root(endpoint: Endpoint) -> str:
    """Where a self-hosted server answers in its own way: the base URL without `/v1`."""
    return endpoint.base_url.rstrip("/").removesuffix("/v1").rstrip("/")
