"""The two HTTP clients, both of which dial only what the destination policy allows (R19-R23, R31).

The data plane goes through aiohttp, the control plane through httpx (performance: see the architecture page). The check is
the same function on both, asked twice: for every record that DNS gives, of which one forbidden record refuses all, and for
the address that is really dialled. A pool never holds connections of two policies, because its key is the policy.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast

import aiohttp
import certifi
import httpcore
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import Connection

from providers import errors
from providers.destination import Policy, check_address

DNS_TIMEOUT = 5.0
DNS_THREADS = 16
DNS_TTL = 30
"""Seconds. A changed record is used within a minute (F12)."""
KEEPALIVE = 30.0
MAX_HEADER_LINE = 16_384
MAX_HEADERS = 128
MAX_INFORMATIONAL = 16
"""1xx answers before the real one; more are a flood (F06)."""
READ_BYTES = 64 * 1024
"""Of an answer at most are read from a connection at once."""
READ_BUFFER = 16 * 1024
"""While so many bytes wait to be taken, a connection is read from; from twice as many on it is not."""
USER_AGENT = "Penstock"

# Not the loop's own executor: a name server that hangs may use up these threads and no others.
_dns_threads = ThreadPoolExecutor(DNS_THREADS, thread_name_prefix="dns")


@functools.lru_cache(maxsize=64)
def tls_context(ca_pem: str = "") -> ssl.SSLContext:
    """Verification is always on (R31). With `ca_pem`, that bundle is trusted and nothing else. Raises TlsError."""
    try:
        if ca_pem:
            return ssl.create_default_context(cadata=ca_pem)
        context = ssl.create_default_context()
        # A slim container has no certificates of its own.
        context.load_verify_locations(certifi.where())
    except (ssl.SSLError, ValueError, TypeError) as error:
        raise errors.TlsError(detail="the CA bundle cannot be read") from error
    return context


async def resolve(host: str, port: int, *, family: int = socket.AF_UNSPEC) -> list[tuple[int, str]]:
    """(family, address) of every record of `host`. Raises OSError; TimeoutError after DNS_TIMEOUT.

    The look-up runs in a thread of its own pool, so a slow name server never holds up the event loop (F12).
    """
    look_up = functools.partial(socket.getaddrinfo, host, port, family=family, type=socket.SOCK_STREAM)
    async with asyncio.timeout(DNS_TIMEOUT):
        try:
            records = await asyncio.get_running_loop().run_in_executor(_dns_threads, look_up)
        except UnicodeError as error:
            raise OSError(f"{host[:64]!r} is not a host name") from error
    return list(dict.fromkeys((record[0], str(record[4][0])) for record in records))


async def checked_addresses(
    host: str, port: int, *, policy: Policy, family: int = socket.AF_UNSPEC
) -> list[tuple[int, str]]:
    """What `host` leads to. Raises DestinationNotAllowed when any of it is forbidden: a mixed answer is an attack (R21)."""
    records = await resolve(host, port, family=family)
    for _, address in records:
        check_address(address, port, policy=policy)
    return records


class CheckedResolver(AbstractResolver):
    """aiohttp's way to ask for addresses."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        records = await checked_addresses(host, port, policy=self._policy, family=family)
        return [
            ResolveResult(
                hostname=host, host=address, port=port, family=kind, proto=0, flags=socket.AI_NUMERICHOST
            )
            for kind, address in records
        ]

    async def close(self) -> None:
        """Nothing is held: the threads belong to the process."""


def _checked_socket(policy: Policy, address_info: tuple[Any, ...]) -> socket.socket:
    """aiohttp's socket factory: it sees the address that is about to be dialled, IP literals included."""
    family, kind, protocol, _, address = address_info
    check_address(str(address[0]), int(address[1]), policy=policy)
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


class _BoundedResponse(aiohttp.ClientResponse):
    """aiohttp reads 1xx answers until another comes, however many there are."""

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        return await super().start(cast(Connection, _CountedConnection(connection)))


class _CountedConnection:
    """The connection, with a protocol on which at most MAX_INFORMATIONAL answers come before the one that counts."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.protocol = _CountedProtocol(connection.protocol)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


class _CountedProtocol:
    def __init__(self, protocol: Any) -> None:
        self._protocol = protocol
        self._reads = 0

    async def read(self) -> Any:
        self._reads += 1
        if self._reads > MAX_INFORMATIONAL:
            raise errors.ProtocolError(detail="a flood of 1xx answers")
        return await self._protocol.read()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._protocol, name)


@dataclass(slots=True)
class Dial:
    """What the one who sends a request learns of it: whether a connection from the pool was used, and since when there
    was one, in monotonic seconds."""

    reused: bool = False
    connected: float | None = None


DIAL: ContextVar[Dial] = ContextVar("dial")


class _Portions(asyncio.BufferedProtocol):
    """Stands between a connection and aiohttp's protocol, so that one read of the socket brings at most READ_BYTES.

    The loop by itself reads a quarter of a megabyte at once, all of which is kept for a caller who takes nothing (F16).
    `portion` is one for all connections: what was read into it is handed on before anything else is read.
    """

    def __init__(self, protocol: asyncio.Protocol, portion: memoryview) -> None:
        self._portion = portion
        self._take = protocol.data_received
        for name in ("connection_lost", "eof_received", "pause_writing", "resume_writing"):
            setattr(self, name, getattr(protocol, name))

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._portion

    def buffer_updated(self, nbytes: int) -> None:
        self._take(self._portion[:nbytes].tobytes())


def _read_in_portions(protocol: asyncio.Protocol, transport: Any, portion: memoryview) -> None:
    """Have a new connection read no more at once than `portion` holds; with TLS, keep no more than that undecrypted."""
    transport.pause_reading()
    transport.set_protocol(_Portions(protocol, portion))
    if transport.get_extra_info("sslcontext") is not None:
        transport.set_read_buffer_limits(high=READ_BYTES)
    transport.resume_reading()


class _NotingConnector(aiohttp.TCPConnector):
    """Tells `DIAL` when it hands out a connection that has served before. aiohttp's own tracing would cost a tenth of a request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._portion = memoryview(bytearray(READ_BYTES))

    async def connect(self, *args: Any, **kwargs: Any) -> Connection:
        connection = await super().connect(*args, **kwargs)
        dial, protocol = DIAL.get(), cast(Any, connection.protocol)
        dial.connected = time.monotonic()
        if getattr(protocol, "served_before", False):
            dial.reused = True
        elif protocol.transport is not None:
            _read_in_portions(protocol, protocol.transport, self._portion)
        protocol.served_before = True
        return connection


def data_plane_session(policy: Policy, ca_pem: str = "", *, pooled: bool = True) -> aiohttp.ClientSession:
    """A session that dials what `policy` allows, keeps no cookies, reads no environment, and never decompresses (R29)."""
    connector = _NotingConnector(
        resolver=CheckedResolver(policy),
        ttl_dns_cache=DNS_TTL,
        socket_factory=functools.partial(_checked_socket, policy),
        ssl=tls_context(ca_pem),
        limit=0,
        force_close=not pooled,
        keepalive_timeout=KEEPALIVE if pooled else None,
    )
    return aiohttp.ClientSession(
        connector=connector,
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
        auto_decompress=False,
        raise_for_status=False,
        response_class=_BoundedResponse,
        read_bufsize=READ_BUFFER,
        max_line_size=MAX_HEADER_LINE,
        max_field_size=MAX_HEADER_LINE,
        max_headers=MAX_HEADERS,
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
        timeout=aiohttp.ClientTimeout(total=None),
    )


class Sessions:
    """The data plane's sessions of one event loop, one for each (policy, CA), made when first needed.

    The one who opens it closes it. A session without a pool is kept beside each, for the one fresh dial after a pooled
    connection turned out to be closed (F13).
    """

    def __init__(self) -> None:
        self._sessions: dict[tuple[Policy, str, bool], aiohttp.ClientSession] = {}

    def get(self, policy: Policy, ca_pem: str = "", *, fresh: bool = False) -> aiohttp.ClientSession:
        key = (policy, ca_pem, fresh)
        session = self._sessions.get(key)
        if session is None:
            session = self._sessions[key] = data_plane_session(policy, ca_pem, pooled=not fresh)
        return session

    async def close(self) -> None:
        sessions, self._sessions = list(self._sessions.values()), {}
        for session in sessions:
            await session.close()

    async def __aenter__(self) -> Sessions:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self.close()


class CheckedBackend(httpcore.AsyncNetworkBackend):
    """httpcore's way to dial: resolves, checks, and dials the checked address. Host and SNI stay the name's."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            addresses = await checked_addresses(host, port, policy=self._policy)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout("the name server does not answer") from error
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception = httpcore.ConnectError("no address")
        for _, address in addresses:
            check_address(address, port, policy=self._policy)
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)


class CheckedTransport(httpx.AsyncBaseTransport):
    """An httpx transport over `CheckedBackend`."""

    def __init__(self, policy: Policy, ca_pem: str = "") -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls_context(ca_pem), network_backend=CheckedBackend(policy), http2=False
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        assert isinstance(request.stream, httpx.AsyncByteStream)
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        with _as_httpx():
            answer = await self._pool.handle_async_request(
                httpcore.Request(
                    request.method,
                    url,
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
        return httpx.Response(
            answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions
        )

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None = None,
        exc_value: BaseException | None = None,
        traceback: TracebackType | None = None,
    ) -> None:
        await self.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _as_httpx():
            async for part in self._answer.aiter_stream():
                yield part

    async def aclose(self) -> None:
        await self._answer.aclose()


@contextlib.contextmanager
def _as_httpx() -> Iterator[None]:
    """httpx's exceptions carry the names of httpcore's."""
    try:
        yield
    except Exception as error:
        name = type(error).__name__
        if type(error).__module__.startswith("httpcore") and hasattr(httpx, name):
            raise getattr(httpx, name)(str(error)) from error
        raise


def control_plane_client(policy: Policy, ca_pem: str = "") -> httpx.AsyncClient:
    """An httpx client that dials what `policy` allows, follows no redirect and reads no environment.

    No cookie of one answer is sent with the next request, because the one who asks makes a client for each question.
    """
    return httpx.AsyncClient(
        transport=CheckedTransport(policy, ca_pem),
        follow_redirects=False,
        trust_env=False,
        headers={"User-Agent": USER_AGENT, "Accept-Encoding": "identity"},
    )
