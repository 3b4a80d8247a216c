"""Who calls: a gateway key in a header, checked against the snapshot without any I/O."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from audit.addresses import peer_address
from providers.wire import Quota
from proxy import keys
from proxy.errors import AddressNotAllowed, InvalidApiKey
from proxy.scopes import Scope, Scopes, scope, scopes

RawHeaders = Iterable[tuple[bytes, bytes]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

BARE = (b"x-api-key", b"api-key", b"x-goog-api-key")
CARRIERS = frozenset((b"authorization", *BARE))
MAX_KEY = 128
TEAM = "team:"
"""Before the name of a team where it stands for an owner; no user name has a colon."""

_ABSENT_PEPPER = secrets.token_bytes(32)
_ABSENT_DIGEST = keys.digest("0" * 32, _ABSENT_PEPPER)


@dataclass(frozen=True, slots=True)
class Caller:
    """A gateway key as requests need it. Expiries are epoch seconds.

    owner: as records and the API write it, `alice` or `team:ml`; nothing of a key that is nobody's. user_id, team_id: the
    owner's, of which there is one at the most. owner_quota: what all keys of the owner may do together.
    scopes: what its requests are counted for, the key before its owner.
    cache_scope: who shares its cached answers, and since when. budgets: ids of those that its requests are held against.
    """

    id: int
    key_id: str
    name: str
    owner: str
    digest: str = field(repr=False)
    pepper: int
    previous_digest: str = field(default="", repr=False)
    previous_pepper: int = 0
    previous_until: float = 0.0
    expires_at: float | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrency: int | None = None
    resume: bool | None = None
    budgets: tuple[int, ...] = ()
    allowed_models: tuple[str, ...] = ()
    allowed_networks: tuple[Network, ...] = ()
    user_id: int | None = None
    team_id: int | None = None
    owner_quota: Quota | None = None
    record_text: bool = False
    cache_seconds: int | None = None
    cache_scope: str = ""
    scopes: Scopes | None = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        own = Quota(self.requests_per_minute, self.tokens_per_minute, self.max_concurrency)
        found = scopes(scope(self.key_id, "this key", own), self._owner_scope())
        object.__setattr__(self, "scopes", found)

    def _owner_scope(self) -> Scope | None:
        if self.team_id is not None:
            name = self.owner.removeprefix(TEAM)
            return scope(f"team:{self.team_id}", f"the team {name}", self.owner_quota)
        return scope(f"user:{self.user_id}", f"the user {self.owner}", self.owner_quota)

    @property
    def keeps(self) -> bool:
        """Whether anything of its answers is kept."""
        return self.record_text or self.cache_seconds is not None

    def expired(self, now: float) -> bool:
        return self.expires_at is not None and self.expires_at <= now


def presented_key(headers: RawHeaders) -> str:
    """The key a request carries, or nothing. Two different ones are as good as none."""
    found: set[str] = set()
    for name, value in headers:
        if name not in CARRIERS or len(value) > MAX_KEY + 16:
            continue
        text = value.decode("latin-1")
        if name == b"authorization":
            scheme, _, text = text.partition(" ")
            if scheme.lower() != "bearer":
                continue
        found.add(text)
    return found.pop() if len(found) == 1 else ""


def well_formed(text: str) -> bool:
    """Whether `text` has the form and checksum of a gateway key, or of a browser token."""
    return len(text) <= MAX_KEY and (
        keys.parse(text) is not None or keys.parse_browser_token(text) is not None
    )


def authenticate(text: str, callers: Mapping[str, Caller], peppers: Mapping[int, bytes]) -> Caller:
    """The caller whose key, or whose token for browsers, `text` is. InvalidApiKey for anything else.

    Unknown keys are compared with a stand-in, so that time tells nothing about what exists (R14).
    """
    if text.startswith("pen_tmp_"):
        return _of_browser_token(text, callers, peppers)
    parts = keys.parse(text) if len(text) <= MAX_KEY else None
    if parts is None:
        raise InvalidApiKey
    caller = callers.get(parts.key_id)
    now = time.time()
    if caller is None:
        hmac.compare_digest(keys.digest(parts.secret, _ABSENT_PEPPER), _ABSENT_DIGEST)
        raise InvalidApiKey
    if not _matches(caller, parts.secret, peppers, now) or caller.expired(now):
        raise InvalidApiKey
    return caller


def _of_browser_token(text: str, callers: Mapping[str, Caller], peppers: Mapping[int, bytes]) -> Caller:
    """The caller that a browser token stands for: its key must be good, and the token not too old."""
    parts = keys.parse_browser_token(text) if len(text) <= MAX_KEY else None
    now = time.time()
    if parts is None or parts.until <= now:
        raise InvalidApiKey
    caller = callers.get(parts.key_id)
    if caller is None:
        hmac.compare_digest(keys.browser_mac(parts.body, _ABSENT_DIGEST, _ABSENT_PEPPER), parts.mac)
        raise InvalidApiKey
    stored = [(caller.digest, caller.pepper)]
    if caller.previous_digest and caller.previous_until > now:
        stored.append((caller.previous_digest, caller.previous_pepper))
    macs = (keys.browser_mac(parts.body, old, peppers.get(at, _ABSENT_PEPPER)) for old, at in stored)
    if not any(hmac.compare_digest(mac, parts.mac) for mac in macs) or caller.expired(now):
        raise InvalidApiKey
    return caller


def _matches(caller: Caller, secret: str, peppers: Mapping[int, bytes], now: float) -> bool:
    pepper = peppers.get(caller.pepper, _ABSENT_PEPPER)
    if hmac.compare_digest(keys.digest(secret, pepper), caller.digest):
        return True
    if not caller.previous_digest or caller.previous_until <= now:
        return False
    pepper = peppers.get(caller.previous_pepper, _ABSENT_PEPPER)
    return hmac.compare_digest(keys.digest(secret, pepper), caller.previous_digest)


def check_address(caller: Caller, address: str) -> None:
    """AddressNotAllowed when the key is bound to networks and `address` is in none of them."""
    if caller.allowed_networks and not inside(address, caller.allowed_networks):
        raise AddressNotAllowed


@lru_cache(maxsize=4096)
def inside(address: str, networks: tuple[Network, ...]) -> bool:
    """Whether a peer's address is in one of the networks; IPv4 within IPv6 is IPv4, and what is no address is nowhere."""
    ip = peer_address(address)
    return ip is not None and any(ip in network for network in networks if network.version == ip.version)
