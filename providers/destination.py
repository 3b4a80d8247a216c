"""Which addresses may be dialled (the outbound policy, R19-R22). Pure: no DNS, no socket, no settings.

A URL is checked when it is saved, by what can be read in it; an address is checked when it is dialled, on the address
really dialled, because a name says nothing about where it leads a second later.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias
from urllib.parse import SplitResult, urlsplit

from providers.errors import DestinationNotAllowed

IPAddress: TypeAlias = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork: TypeAlias = ipaddress.IPv4Network | ipaddress.IPv6Network
SocketAddress: TypeAlias = tuple[str, int]

MAX_URL = 2048

METADATA_NAMES = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)


def _networks(*texts: str) -> tuple[IPNetwork, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


ALWAYS_REFUSED = _networks(
    # Metadata services of the clouds, link-local, and what is no destination at all.
    "169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "fd20:ce::254/128", "100.100.100.200/32", "168.63.129.16/32",
    "192.0.0.192/32", "0.0.0.0/8", "::/128", "224.0.0.0/4", "ff00::/8", "240.0.0.0/4", "255.255.255.255/32",
)  # fmt: skip
NOT_PUBLIC = _networks(
    "127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10", "198.18.0.0/15", "192.0.0.0/24",
    "192.0.2.0/24", "198.51.100.0/24", "203.0.113.0/24", "192.88.99.0/24", "2001::/23", "2001:db8::/32", "3fff::/20",
)  # fmt: skip
PUBLIC_V6 = _networks("2000::/3", "64:ff9b::/96")
"""Of IPv6 only this is public: global unicast, and the prefix by which IPv6-only hosts reach IPv4 (RFC 6052)."""
DEFAULT_PRIVATE = _networks(
    "127.0.0.0/8", "::1/128", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7"
)

_MAPPED, _NAT64, _LOCAL_NAT64, _SIX_TO_FOUR, _TEREDO, _COMPATIBLE = (
    ipaddress.IPv6Network(text)
    for text in ("::ffff:0:0/96", "64:ff9b::/96", "64:ff9b:1::/48", "2002::/16", "2001::/32", "::/96")
)
LOOPBACK: tuple[IPAddress, ...] = (ipaddress.IPv4Address("127.0.0.1"), ipaddress.IPv6Address("::1"))
_UNSAFE = re.compile(r"[\x00-\x20\x7f\\]")
_NUMBER = re.compile(r"0[xX][0-9a-fA-F]*|[0-9]+")
_DOTS = str.maketrans({"\u3002": ".", "\uff0e": ".", "\uff61": "."})


@dataclass(frozen=True, slots=True)
class Policy:
    """What one endpoint may dial.

    allow_private: a self-hosted kind, or a row on which an administrator allowed it.
    private_networks: the ones that `allow_private` opens, and no others.
    own: our own database, Redis and listening addresses, by address and port; never dialled, whatever else is allowed.
    plain: the URL is `http`, so only a private address may be dialled: a key never crosses a public network in clear.
    """

    allow_private: bool = False
    private_networks: tuple[IPNetwork, ...] = DEFAULT_PRIVATE
    own: frozenset[SocketAddress] = frozenset()
    plain: bool = False
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # A policy is the key of a pool, looked up for every request; hashing the networks anew each time would show.
        parts = (self.allow_private, self.private_networks, self.own, self.plain)
        object.__setattr__(self, "_hash", hash(parts))

    def __hash__(self) -> int:
        return self._hash


def check_url(
    url: str,
    *,
    allow_private: bool,
    private_networks: Sequence[IPNetwork] = DEFAULT_PRIVATE,
    own: Collection[SocketAddress] = (),
) -> None:
    """Raise DestinationNotAllowed, with the reason as its text, for a base URL that may not be saved.

    `allow_private` is true for a self-hosted kind too. Does no DNS: a name is checked where it leads when it is dialled.
    """
    parts = _split(url)
    host = _plain_host(parts)
    if host in METADATA_NAMES:
        raise DestinationNotAllowed("This is the name of a metadata service.")
    if (host, _port(parts)) in own:
        raise DestinationNotAllowed("This is an address of the gateway itself, its database or its Redis.")
    policy = Policy(allow_private, tuple(private_networks), frozenset(own), plain=parts.scheme == "http")
    literal = _literal(host)
    if literal is not None:
        check_address(str(literal), _port(parts), policy=policy)
    elif host == "localhost" or host.endswith(".localhost"):
        if not allow_private:
            raise DestinationNotAllowed("A private address needs the permission to allow private addresses.")
        for loopback in LOOPBACK:
            _check_own(loopback, _port(parts), policy)
    elif not allow_private and policy.plain:
        raise DestinationNotAllowed("Use https: over http a key would cross a public network in clear.")


def _check_own(address: IPAddress, port: int, policy: Policy) -> None:
    if any(port == own_port and _same(address, own) for own, own_port in policy.own):
        raise DestinationNotAllowed("This is an address of the gateway itself, its database or its Redis.")


def check_address(ip: str, port: int, *, policy: Policy) -> None:
    """Raise DestinationNotAllowed unless this address, the one that is about to be dialled, is allowed."""
    if "%" in ip:
        raise DestinationNotAllowed("A link-local address may not be dialled.")
    try:
        address = _unmapped(ipaddress.ip_address(ip))
    except ValueError:
        raise DestinationNotAllowed("This is not an address.") from None
    for each in (address, *_embedded(address)):
        _check_one(each, policy)
    _check_own(address, port, policy)
    if policy.plain and is_public(address):
        raise DestinationNotAllowed("Use https: over http a key would cross a public network in clear.")


def is_public(address: IPAddress) -> bool:
    if any(_in(address, network) for network in (*NOT_PUBLIC, *ALWAYS_REFUSED)):
        return False
    return address.version == 4 or any(_in(address, network) for network in PUBLIC_V6)


def _check_one(address: IPAddress, policy: Policy) -> None:
    if any(_in(address, network) for network in ALWAYS_REFUSED):
        raise DestinationNotAllowed(
            "This address is never dialled: it is link-local, a metadata service, or no host."
        )
    if is_public(address):
        return
    if not policy.allow_private:
        raise DestinationNotAllowed("A private address needs the permission to allow private addresses.")
    if not any(_in(address, network) for network in policy.private_networks):
        raise DestinationNotAllowed("This private address is not in PRIVATE_NETWORKS.")


def _in(address: IPAddress, network: IPNetwork) -> bool:
    return address.version == network.version and address in network


def _unmapped(address: IPAddress) -> IPAddress:
    """`::ffff:a.b.c.d` is a.b.c.d to the operating system."""
    if isinstance(address, ipaddress.IPv6Address) and address in _MAPPED:
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def _embedded(address: IPAddress) -> Iterator[ipaddress.IPv4Address]:
    """The IPv4 addresses that an IPv6 address may lead to: NAT64 (RFC 6052, 8215), 6to4, Teredo, IPv4-compatible."""
    if not isinstance(address, ipaddress.IPv6Address):
        return
    bits = int(address)
    low = ipaddress.IPv4Address(bits & 0xFFFFFFFF)
    if address in _NAT64 or (address in _COMPATIBLE and bits > 0xFFFF):
        yield low
    elif address in _LOCAL_NAT64:
        yield low
        # With a /48 prefix the address lies around bits 64 to 71, which are zero (RFC 6052, 2.2).
        yield ipaddress.IPv4Address(((bits >> 64) & 0xFFFF) << 16 | (bits >> 40) & 0xFFFF)
    elif address in _SIX_TO_FOUR:
        yield ipaddress.IPv4Address((bits >> 80) & 0xFFFFFFFF)
    elif address in _TEREDO:
        yield ipaddress.IPv4Address((bits >> 64) & 0xFFFFFFFF)
        yield ipaddress.IPv4Address(int(low) ^ 0xFFFFFFFF)


def _same(address: IPAddress, own: str) -> bool:
    try:
        mine = _unmapped(ipaddress.ip_address(own))
    except ValueError:
        return False
    # A server that listens on every address is at each loopback address, whichever one it is called by.
    return address == mine or (mine.is_unspecified and address.is_loopback)


def _split(url: str) -> SplitResult:
    if not url or len(url) > MAX_URL or _UNSAFE.search(url):
        raise DestinationNotAllowed("Write a URL without spaces, backslashes or control characters.")
    try:
        parts = urlsplit(url)
    except ValueError:
        raise DestinationNotAllowed("This is not a URL.") from None
    if parts.scheme not in {"http", "https"}:
        raise DestinationNotAllowed("Only http and https addresses can be dialled.")
    if "@" in parts.netloc:
        raise DestinationNotAllowed("A user name or password does not belong into the URL.")
    if "#" in url or "?" in url:
        raise DestinationNotAllowed("A base URL has no query and no fragment.")
    _port(parts)
    return parts


def _port(parts: SplitResult) -> int:
    try:
        port = parts.port
    except ValueError:
        raise DestinationNotAllowed("The port is not a number from 1 to 65535.") from None
    if port == 0:
        raise DestinationNotAllowed("The port is not a number from 1 to 65535.")
    return port or (443 if parts.scheme == "https" else 80)


def _plain_host(parts: SplitResult) -> str:
    """The host in lower case, without the dots at its end. Other alphabets are allowed in names, not in addresses."""
    host = (parts.hostname or "").rstrip(".").lower()
    if not host or "%" in host:
        raise DestinationNotAllowed("The URL needs a host, without a zone or percent signs.")
    folded = unicodedata.normalize("NFKC", host.translate(_DOTS)).lower().rstrip(".")
    if folded != host and (_is_numeric(folded) or folded in METADATA_NAMES or ":" in folded):
        raise DestinationNotAllowed("Write an address with plain digits and dots.")
    return folded


def _literal(host: str) -> IPAddress | None:
    """The address that `host` spells, or None for a name. An address in any but its usual spelling is refused."""
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        pass
    if _is_numeric(host) or ":" in host:
        raise DestinationNotAllowed("Write an address in its usual form, such as 192.0.2.1.")
    return None


def _is_numeric(host: str) -> bool:
    """Would a resolver take it for a number (`2852039166`, `0xa9fea9fe`, `127.1`)? A name never ends in one."""
    return _NUMBER.fullmatch(host.rpartition(".")[2]) is not None
