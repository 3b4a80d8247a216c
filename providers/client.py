"""Names, certificates, and the control plane's HTTP client, which dials only what the destination policy allows (R19-R23, R31).

The control plane goes through httpx, the data plane through `connections` (performance: see the architecture page). The check is
the same function on both, asked twice: for every record that DNS gives, of which one forbidden record refuses all, and for
the address that is really dialled.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
import ssl
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import certifi
import httpcore
import httpx

from providers import errors
from providers.destination import Policy, check_address

DNS_TIMEOUT = 5.0
DNS_THREADS = 16
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


async def resolve(host: str, port: int) -> list[tuple[int, str]]:
    """(family, address) of every record of `host`. Raises OSError; TimeoutError after DNS_TIMEOUT.

    The look-up runs in a thread of its own pool, so a slow name server never holds up the event loop (F12). An address is looked up
    nowhere: it must not wait for a thread while name servers hang.
    """
    with contextlib.suppress(ValueError):
        version = ipaddress.ip_address(host).version
        return [(socket.AF_INET if version == 4 else socket.AF_INET6, host)]
    look_up = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    async with asyncio.timeout(DNS_TIMEOUT):
        try:
            records = await asyncio.get_running_loop().run_in_executor(_dns_threads, look_up)
        except UnicodeError as error:
            raise OSError(f"{host[:64]!r} is not a host name") from error
    return list(dict.fromkeys((record[0], str(record[4][0])) for record in records))


async def checked_addresses(host: str, port: int, *, policy: Policy) -> list[tuple[int, str]]:
    """What `host` leads to. Raises DestinationNotAllowed when any of it is forbidden: a mixed answer is an attack (R21)."""
    records = await resolve(host, port)
    for _, address in records:
        check_address(address, port, policy=policy)
    return records


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
