"""The data plane's way to providers: connections that lead where the policy allows, and are kept for the next request.

Nothing is remembered or read from the environment, and one address is asked in one way: no proxies, no HTTP/2.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit

from aiohappyeyeballs import start_connection
from multidict import CIMultiDict

from providers import errors
from providers.client import USER_AGENT, checked_addresses, tls_context
from providers.destination import Policy, check_address
from providers.http1 import READ_BYTES, Connection, Place, Response
from providers.wire import DEFAULT_PORTS

DNS_TTL = 30
"""Seconds. A changed record is used within a minute (F12)."""
NEXT_ADDRESS = 0.25
"""Seconds after which a name's next address is tried beside the one that does not answer (RFC 8305)."""
KEEPALIVE = 30.0
"""Seconds that a connection without a request is kept."""
URL_CHARACTERS = "%/:=&?~#+!$,;'@()*[]"
"""That stand for themselves in a request's target."""


@dataclass(slots=True)
class Dial:
    """What the one who sends a request learns of it: since when there was a connection, in monotonic seconds."""

    connected: float | None = None


class Pool:
    """The connections of one policy and one CA bundle, on one event loop. Whoever makes it closes it."""

    def __init__(self, policy: Policy, ca_pem: str = "") -> None:
        self._policy, self._tls = policy, tls_context(ca_pem)
        self._idle: dict[Place, list[Connection]] = {}
        self._all: set[Connection] = set()
        self._look_ups: dict[tuple[str, int], asyncio.Task[list[tuple[int, str]]]] = {}
        self._sweep: asyncio.TimerHandle | None = None
        self.portion = memoryview(bytearray(READ_BYTES))

    async def request(
        self,
        method: str,
        url: str,
        headers: CIMultiDict[str],
        body: bytes | None,
        *,
        connect: float,
        dial: Dial,
    ) -> Response:
        """Send a request, with `connect` seconds for a connection, and wait for the head of its answer.

        Twice when a connection from the pool turns out to be closed before one byte of an answer came (F13). Raises from
        `providers.errors`, OSError, ssl.SSLError, or TimeoutError when there is no connection in time.
        """
        place, start = _start(method, url)
        head = _head(start, headers, body)
        if (connection := self._take(place)) is not None:
            dial.connected = time.monotonic()
            try:
                return await connection.ask(head, body or b"")
            except errors.ConnectFailed:
                if connection.begun:
                    raise
        async with asyncio.timeout(connect):
            connection = await self._connect(place)
        dial.connected = time.monotonic()
        return await connection.ask(head, body or b"")

    def _take(self, place: Place) -> Connection | None:
        """The one that was used last, which is the least likely to be closed."""
        idle = self._idle.get(place)
        while idle:
            connection = idle.pop()
            if not connection.closing:
                return connection
        return None

    def put(self, place: Place, connection: Connection) -> None:
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.setdefault(place, []).append(connection)
        self._sweep_later()

    def forget(self, connection: Connection) -> None:
        self._all.discard(connection)

    def _sweep_later(self) -> None:
        if self._sweep is None and self._idle:
            self._sweep = asyncio.get_running_loop().call_later(KEEPALIVE, self._sweep_up)

    def _sweep_up(self) -> None:
        """Close what has been idle for too long."""
        before = asyncio.get_running_loop().time() - KEEPALIVE
        self._sweep = None
        for place, connections in list(self._idle.items()):
            for each in connections:
                if each.idle_since <= before:
                    each.drop()
            if left := [each for each in connections if not each.closing]:
                self._idle[place] = left
            else:
                del self._idle[place]
        self._sweep_later()

    async def _connect(self, place: Place) -> Connection:
        loop = asyncio.get_running_loop()
        dialled = await start_connection(
            [
                (family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, place.port))
                for family, address in await self._addresses(place.host, place.port)
            ],
            happy_eyeballs_delay=NEXT_ADDRESS,
            interleave=1,
            socket_factory=functools.partial(_checked_socket, self._policy),
        )
        _, connection = await loop.create_connection(
            functools.partial(Connection, self, place),
            sock=dialled,
            ssl=self._tls if place.tls else None,
            server_hostname=place.host if place.tls else None,
        )
        self._all.add(connection)
        return connection

    async def _addresses(self, host: str, port: int) -> list[tuple[int, str]]:
        """One question for all who want to know, whose answer is good for DNS_TTL."""
        look_up = self._look_ups.get((host, port))
        if look_up is None:
            look_up = asyncio.create_task(checked_addresses(host, port, policy=self._policy))
            self._look_ups[host, port] = look_up
            look_up.add_done_callback(functools.partial(self._looked_up, (host, port)))
        return await asyncio.shield(look_up)

    def _looked_up(self, name: tuple[str, int], look_up: asyncio.Task[list[tuple[int, str]]]) -> None:
        if look_up.cancelled() or look_up.exception() is not None:
            self._look_ups.pop(name, None)
        else:
            look_up.get_loop().call_later(DNS_TTL, self._look_ups.pop, name, None)

    def close(self) -> None:
        if self._sweep is not None:
            self._sweep.cancel()
        for look_up in self._look_ups.values():
            look_up.cancel()
        for connection in list(self._all):
            connection.drop(errors.Interrupted(detail="the gateway stops"))
        self._idle.clear()


class Pools:
    """The data plane's pools of one event loop, one for each (policy, CA): no connection is shared by two policies."""

    def __init__(self) -> None:
        self._pools: dict[tuple[Policy, str], Pool] = {}

    def get(self, policy: Policy, ca_pem: str = "") -> Pool:
        pool = self._pools.get((policy, ca_pem))
        if pool is None:
            pool = self._pools[policy, ca_pem] = Pool(policy, ca_pem)
        return pool

    async def close(self) -> None:
        pools, self._pools = list(self._pools.values()), {}
        for pool in pools:
            pool.close()
        await asyncio.sleep(0)  # What was dropped is closed in the loop's next turn.

    async def __aenter__(self) -> Pools:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()


@functools.lru_cache(maxsize=1024)
def _start(method: str, url: str) -> tuple[Place, str]:
    """Where a request goes, and its first lines. Raises DestinationNotAllowed for what is no http URL."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode()
        port = parts.port or DEFAULT_PORTS[parts.scheme]
    except (ValueError, KeyError) as error:
        raise errors.DestinationNotAllowed(detail="the request leads to no http address") from error
    if not host:
        raise errors.DestinationNotAllowed(detail="the request leads to no host")
    target = quote(f"{parts.path or '/'}{'?' + parts.query if parts.query else ''}", safe=URL_CHARACTERS)
    shown = f"[{host}]" if ":" in host else host
    if port != DEFAULT_PORTS[parts.scheme]:
        shown = f"{shown}:{port}"
    return Place(host, port, parts.scheme == "https"), f"{method} {target} HTTP/1.1\r\nHost: {shown}"


def _head(start: str, headers: CIMultiDict[str], body: bytes | None) -> bytes:
    """The head of a request. Raises HeaderNotAllowed for what would be more lines than it is headers (R27)."""
    headers.setdefault("User-Agent", USER_AGENT)
    headers.setdefault("Accept", "*/*")
    headers["Accept-Encoding"] = "identity"
    if body is not None:
        headers["Content-Length"] = str(len(body))
    lines = [start, *[f"{name}: {value}" for name, value in headers.items()], "", ""]
    head = "\r\n".join(lines)
    if head.count("\n") != len(headers) + 3 or head.count("\r") != len(headers) + 3 or "\0" in head:
        raise errors.HeaderNotAllowed(detail="a header of more than one line")
    try:
        return head.encode("latin-1")
    except UnicodeEncodeError as error:
        raise errors.HeaderNotAllowed(detail="a header that is not Latin-1") from error


def _checked_socket(policy: Policy, address_info: tuple[Any, ...]) -> socket.socket:
    """It sees the address that is about to be dialled, whatever was looked up before."""
    family, kind, protocol, _, address = address_info
    check_address(str(address[0]), int(address[1]), policy=policy)
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made
