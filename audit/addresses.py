"""Addresses of callers, in the one form that is compared, hashed and kept."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address


def peer_address(text: str) -> IPv4Address | IPv6Address | None:
    """What a server, or a proxy, tells of a caller: IPv4 within IPv6 is IPv4, and a zone is left out; None for what is no address."""
    try:
        found = ip_address(text.partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
