"""The one door to the providers, and the only one to their secrets.

`stream` is the data plane's: it hands out a `Reply` as soon as the head of the answer is there. `ask` is the control plane's:
it hands out a whole, bounded `Answer`. Both check the destination and the custom headers again, open the secret in memory for
this one call, follow no redirect, take no compressed answer, and turn every foreign exception into `providers.errors`.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Mapping
from urllib.parse import urlsplit

import httpx
from django.conf import settings
from multidict import CIMultiDict

from providers import adapters, errors
from providers.client import control_plane_client
from providers.connections import Dial, Pools
from providers.crypto import Secret
from providers.destination import Policy
from providers.own_addresses import OwnAddresses
from providers.replies import ErrorReply, LocalReply, Reply, read_beginning, read_bounded, redact, words
from providers.secret_stores import store_of
from providers.secret_stores.sealed import open_sealed
from providers.wire import Answer, Credential, Endpoint, Kind, WireRequest, origin_of

__all__ = ["Reply", "ask", "mapped", "open_secret", "read_beginning", "read_bounded", "stream"]

MAX_ANSWER_BYTES = 4 * 1024 * 1024

logger = logging.getLogger(__name__)
_own_addresses = OwnAddresses()
_policies: dict[tuple[bool, bool], tuple[object, Policy]] = {}
"""The four that there are, by (allow_private, plain), with the setting they were made of: made anew when that changes."""


async def stream(
    pools: Pools,
    endpoint: Endpoint,
    request: WireRequest,
    *,
    credential: Credential | None,
    dial: Dial | None = None,
    request_id: str = "",
) -> Reply:
    """Dial, send, and wait for the head of the answer, for as long as the caller lets it. dial: is told how it went.

    request_id: is sent as `x-request-id`, for the upstream's own log.

    Judges nothing but redirects, compressed answers and what is not HTTP. Raises from `providers.errors`.
    """
    kind = adapters.kind(endpoint.kind)
    if kind.local is not None:
        return LocalReply(kind.local(request))
    policy = await _policy(endpoint, kind, request)
    headers, secret = await _sealed_up(endpoint, kind, request, credential)
    if request_id:
        headers.setdefault("x-request-id", request_id)
    try:
        response = await pools.get(policy, endpoint.ca_pem).request(
            request.method,
            request.url,
            headers,
            request.body,
            connect=endpoint.timeouts.connect,
            dial=dial or Dial(),
        )
    except OSError as error:
        raise mapped(error) from error
    try:
        _check_head(endpoint, response.status, response.headers)
    except errors.ProviderError:
        response.close()
        raise
    return response if response.status < 300 else ErrorReply(response, secret)


async def ask(
    endpoint: Endpoint,
    request: WireRequest,
    *,
    credential: Credential | None,
    timeout: float,  # noqa: ASYNC109 - the caller's budget for the whole question, which is the thing itself here
    max_bytes: int = MAX_ANSWER_BYTES,
) -> Answer:
    """One question and its whole answer, whatever its status, in `timeout` seconds. Raises from `providers.errors`."""
    kind = adapters.kind(endpoint.kind)
    if kind.local is not None:
        return kind.local(request)
    policy = await _policy(endpoint, kind, request)
    headers, secret = await _sealed_up(endpoint, kind, request, credential)
    try:
        async with asyncio.timeout(timeout), control_plane_client(policy, endpoint.ca_pem) as client:
            question = client.build_request(
                request.method,
                request.url,
                content=request.body,
                headers=list(headers.items()),
                timeout=httpx.Timeout(None, connect=endpoint.timeouts.connect),
            )
            return await _whole_answer(client, question, secret, max_bytes)
    except (httpx.HTTPError, httpx.InvalidURL, OSError, errors.ProviderError) as error:
        raise mapped(error) from error


async def _whole_answer(
    client: httpx.AsyncClient, question: httpx.Request, secret: Secret | None, max_bytes: int
) -> Answer:
    response = await client.send(question, stream=True)
    try:
        _check_encoding(response.headers)
        body = bytearray()
        async for part in response.aiter_raw():
            body += part
            if len(body) > max_bytes:
                raise errors.ProtocolError(detail=f"the answer is above {max_bytes} bytes")
    finally:
        await response.aclose()
    return Answer(response.status_code, response.headers, redact(bytes(body), secret))


async def open_secret(credential: Credential, *, origin: str) -> Secret:
    """The value of a stored credential, for this call. Raises CredentialUnavailable; nothing is dialled then."""
    secret = open_sealed(credential.stored, uid=credential.uid, origin=origin)
    if found := store_of(secret.reveal()):
        store, reference = found
        secret = await store.read(reference)
    if not _is_header_value(secret.reveal()):
        raise errors.CredentialUnavailable(
            detail="the value cannot be sent: it is not one line of printable ASCII"
        )
    return secret


def _is_header_value(value: str) -> bool:
    return value.isascii() and value.isprintable() and bool(value.strip())


async def _policy(endpoint: Endpoint, kind: Kind, request: WireRequest) -> Policy:
    """What this request may dial. It goes to the origin that its secret is bound to, or nowhere."""
    try:
        astray = origin_of(request.url) != endpoint.origin
    except ValueError:
        astray = True
    if astray:
        raise errors.DestinationNotAllowed(detail="the request leads to another origin than its provider")
    own = await _own_addresses.get()
    key = (endpoint.allow_private or kind.self_hosted, urlsplit(request.url).scheme == "http")
    networks, policy = _policies.get(key, (None, None))
    if policy is None or policy.own is not own or networks is not settings.PRIVATE_NETWORKS:
        allow_private, plain = key
        policy = Policy(allow_private, tuple(settings.PRIVATE_NETWORKS), own, plain)
        _policies[key] = (settings.PRIVATE_NETWORKS, policy)
    return policy


async def _sealed_up(
    endpoint: Endpoint, kind: Kind, request: WireRequest, credential: Credential | None
) -> tuple[CIMultiDict[str], Secret | None]:
    """The headers of a request with its credential. Later ones win: custom, the adapter's, the credential's."""
    _check_custom_headers(endpoint)
    headers = CIMultiDict[str]()
    for name, value in (*endpoint.headers, *request.headers):
        headers[name] = value
    if credential is None:
        if kind.needs_key:
            raise errors.CredentialUnavailable(detail="this kind of provider needs a key, and there is none")
        return headers, None
    secret = await open_secret(credential, origin=endpoint.origin)
    for name, value in (request.authorize or kind.authorize)(secret.reveal()):
        headers[name] = value
    return headers, secret


def _check_custom_headers(endpoint: Endpoint) -> None:
    """Forms refuse such headers; a row may have been written past them (R27)."""
    if not endpoint.headers:
        return
    from providers.models.checks import MAX_HEADERS, header_problem

    if len(endpoint.headers) > MAX_HEADERS:
        raise errors.HeaderNotAllowed(detail=f"more than {MAX_HEADERS} custom headers")
    for name, value in endpoint.headers:
        if problem := header_problem(name, value):
            raise errors.HeaderNotAllowed(detail=problem)


def _check_head(endpoint: Endpoint, status: int, headers: Mapping[str, str]) -> None:
    if 300 <= status < 400:
        location = _without_query(headers.get("Location", ""))
        logger.warning("upstream_redirect", extra={"provider": endpoint.slug, "location": location})
        raise errors.UpstreamRedirect(detail=f"HTTP {status} to {location}", upstream_status=status)
    _check_encoding(headers)


def _check_encoding(headers: Mapping[str, str]) -> None:
    """We asked for no compression, and decompress nothing: 200 kB can be 200 MB (R29)."""
    encoding = headers.get("Content-Encoding", "").strip().lower()
    if encoding not in {"", "identity"}:
        raise errors.ProtocolError(detail=f"a compressed answer ({encoding[:32]}) that nobody asked for")


def _without_query(location: str) -> str:
    return location.partition("?")[0].partition("#")[0][:512]


_FOREIGN: tuple[tuple[tuple[type[BaseException], ...], type[errors.ProviderError]], ...] = (
    ((TimeoutError, httpx.TimeoutException), errors.UpstreamTimeout),
    ((httpx.InvalidURL, httpx.UnsupportedProtocol), errors.DestinationNotAllowed),
    ((httpx.ConnectError, httpx.WriteError, OSError), errors.ConnectFailed),
    ((httpx.HTTPError,), errors.ProtocolError),
)


def mapped(error: BaseException) -> errors.ProviderError:
    """A foreign exception, before the head of an answer was there, as one of ours."""
    if isinstance(error, errors.ProviderError):
        return error
    if _tls_beneath(error):
        return errors.TlsError(detail=words(error))
    ours = next((ours for foreign, ours in _FOREIGN if isinstance(error, foreign)), errors.UpstreamError)
    return ours(detail=words(error))


def _tls_beneath(error: BaseException | None) -> bool:
    """httpx tells of a failed handshake as of any failed connection; the reason is further down."""
    for _ in range(8):
        if error is None:
            return False
        if isinstance(error, ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False
