"""Where we ourselves listen and keep our data: no provider may point there (R20)."""

from __future__ import annotations

import asyncio
from urllib.parse import urlsplit

from django.conf import settings

from providers.client import resolve
from providers.destination import SocketAddress

LIFETIME = 60.0
"""Seconds that the addresses of a name are kept: a database may move to another host."""
_PORTS = {"postgresql": 5432, "redis": 6379, "rediss": 6379}


def own_places() -> frozenset[SocketAddress]:
    """Host and port of the database, Redis and our listener, as the settings have them: names or addresses. No DNS."""
    places = {(settings.HOST, int(settings.PORT))}
    for database in settings.DATABASES.values():
        host = str(database.get("HOST") or "")
        if host and not host.startswith("/"):
            places.add((host, int(database.get("PORT") or 5432)))
    redis = urlsplit(settings.REDIS_URL or "")
    if redis.scheme in _PORTS and redis.hostname:
        places.add((redis.hostname, redis.port or _PORTS[redis.scheme]))
    return frozenset(place for host, port in places for place in _with_loopback(host.lower(), port))


def _with_loopback(host: str, port: int) -> list[SocketAddress]:
    return [(each, port) for each in ([host, "127.0.0.1", "::1"] if host == "localhost" else [host])]


class OwnAddresses:
    """`own_places` as addresses. Names are looked up in a thread and kept for a minute."""

    def __init__(self) -> None:
        self._known: frozenset[SocketAddress] = frozenset()
        self._until = 0.0

    async def get(self) -> frozenset[SocketAddress]:
        now = asyncio.get_running_loop().time()
        if now >= self._until:
            found = await self._look_up()
            # The same object while nothing changed: it is part of what pools are found by.
            self._known = self._known if found == self._known else found
            self._until = now + LIFETIME
        return self._known

    async def _look_up(self) -> frozenset[SocketAddress]:
        found: set[SocketAddress] = set()
        for host, port in own_places():
            try:
                found |= {(address, port) for _, address in await resolve(host, port)}
            except OSError:
                # A name that leads nowhere now cannot be dialled; where it led before stays refused.
                found |= {known for known in self._known if known[1] == port}
        return frozenset(found)
