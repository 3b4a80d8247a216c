"""The data plane over HTTP, as Channels consumers that read `receive()` themselves.

Channels awaits a handler before it reads the next message, so a stock consumer that streams does not notice that its
caller has left. These collect the body to its limit, and then wait for the caller's leaving beside the work.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

from channels.consumer import AsyncConsumer
from django.conf import settings

from audit.request_ids import REQUEST_ID, request_id_from
from providers.errors import ProviderError
from proxy import metrics, pipeline, selection
from proxy.attempts import Attempt
from proxy.auth import RawHeaders
from proxy.cors import cors_headers, preflight
from proxy.dialects import openai
from proxy.errors import (
    GatewayError,
    MethodNotAllowed,
    ModelNotFound,
    NotFound,
    RequestTimeout,
    RequestTooLarge,
    UnsupportedMediaType,
)
from proxy.gateway import Gateway
from proxy.inflight import Running
from proxy.traffic import CLIENT_LEFT

logger = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

JSON = (b"content-type", b"application/json")
EVENT_STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
RESUME = {b"on": True, b"off": False}
# Answers belong to one caller, and a proxy in front must not collect a stream before passing it on.
ALWAYS = (
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
    (b"x-content-type-options", b"nosniff"),
)


class HttpRequest:
    """An HTTP request for the pipeline."""

    key_name = ""

    def __init__(self, scope: Scope, receive: Receive) -> None:
        self._receive = receive
        self._state: dict[str, Any] = scope.get("state", {})
        self.headers: RawHeaders = scope["headers"]
        self._named = named = dict(scope["headers"])
        self.address = (scope.get("client") or ("",))[0]
        self.id = request_id_from(named.get(b"x-request-id", b"").decode("latin-1"))
        self.length = _length(named.get(b"content-length", b""))
        self.resume = RESUME.get(named.get(b"x-penstock-resume", b""))

    async def body(self) -> bytes:
        """The whole body. Raises UnsupportedMediaType, RequestTooLarge, RequestTimeout."""
        limit = settings.MAX_REQUEST_BYTES
        if self.length > limit:
            raise RequestTooLarge
        if self._named.get(b"content-encoding", b"identity") != b"identity":
            raise UnsupportedMediaType
        kind = self._named.get(b"content-type", b"")
        if kind != b"application/json" and kind.partition(b";")[0].strip().lower() != b"application/json":
            raise UnsupportedMediaType
        parts: list[bytes] = []
        size = 0
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise RequestTimeout
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > limit:
                raise RequestTooLarge
            if not message.get("more_body"):
                return parts[0] if len(parts) == 1 else b"".join(parts)

    def left(self, running: Running) -> Leaving:
        return Leaving(self._state, self._receive, running)


class Leaving:
    """While the block runs, the caller's leaving ends it; the watching itself always ends with the block.

    Our own server calls a function that it finds in the request's state. Of any other (daphne, in development) a task waits for
    the message, which costs every request a tenth of what it takes.
    """

    __slots__ = ("_receive", "_running", "_state", "_watching")

    def __init__(self, state: dict[str, Any], receive: Receive, running: Running) -> None:
        self._state = state
        self._receive = receive
        self._running = running
        self._watching: asyncio.Task[None] | None = None

    async def __aenter__(self) -> None:
        if self._state.get("gone"):
            self._leave()
        elif "on_leaving" in self._state:
            self._state["on_leaving"] = self._leave
        else:
            self._watching = asyncio.create_task(self._watch())

    async def __aexit__(self, *exception: object) -> None:
        if self._watching is None:
            self._state["on_leaving"] = None
            return
        self._watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._watching

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._leave()

    def _leave(self) -> None:
        self._running.end("client_left")


class HttpSink:
    """An HTTP answer: a JSON body, or events. status: what the caller was told; of a stream that broke, that of its error."""

    status = CLIENT_LEFT

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self._send = send
        self._state = scope.get("state", {})
        self._request_id = request_id
        self._shared = (*ALWAYS, (b"x-request-id", request_id.encode()), *cors_headers(scope))
        self._streams = False
        self.begun = False

    async def begin(self, attempt: Attempt, length: int | None = None) -> None:
        call, candidate = attempt.call, attempt.candidate
        self._streams = call.chat.stream
        headers = [
            EVENT_STREAM if self._streams else JSON,
            *taken_way(candidate.upstream.slug, candidate.model, call.plan.route),
            (b"x-penstock-attempts", b"%d" % attempt.number),
            (b"x-penstock-config", b"%d" % call.config_version),
            *call.held.headers,
        ]
        if call.cache:
            headers.append((b"x-penstock-cache", call.cache.encode()))
        if length is not None:
            headers.append((b"content-length", b"%d" % length))
        await self._start(200, headers)

    async def send(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self, data: bytes) -> None:
        await self._send({"type": "http.response.body", "body": data})

    async def keep_alive(self) -> None:
        await self.send(b": keep-alive\n\n")

    async def answer(
        self, body: bytes, status: int = 200, headers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        await self._start(status, [JSON, (b"content-length", str(len(body)).encode()), *headers])
        await self.end(body)

    async def fail(self, error: GatewayError | ProviderError) -> None:
        """Tell what went wrong: as a status while nothing was sent, else as the stream's one and last error event."""
        if self.begun and self._streams:
            self.status = error.status
            event = openai.error_event(error.status, error.code, error.text, self._request_id)
            # The server closes the connection after this (config.connection).
            self._state["close"] = True
            await self.end(event)
            return
        metrics.REFUSED.labels(error.code).inc()
        body = openai.error(error.status, error.code, error.text, self._request_id, error.param)
        await self.answer(body, error.status, (*retry_after(error), *getattr(error, "headers", ())))

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.begun = True
        self.status = status
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*headers, *self._shared]}
        )


class DataPlaneConsumer(AsyncConsumer):
    """One request from beginning to end; `serve` is what a path does, `route` what it is counted under."""

    gateway: Gateway
    method = "POST"
    route = "/v1/..."

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HttpRequest(scope, receive)
        sink = HttpSink(scope, send, request.id)
        if scope["method"] == "OPTIONS":
            await sink.answer(b"", 204, preflight(scope))
            return
        began = time.monotonic()
        # A request has a task of its own, so what is bound here is said of its lines and of no others.
        REQUEST_ID.set(request.id)
        try:
            if scope["method"] not in {self.method, "HEAD" if self.method == "GET" else ""}:
                raise MethodNotAllowed
            await self.serve(scope, request, sink)
        except (GatewayError, ProviderError) as error:
            # Its frames hold it, too, and all that the request took: no cycle to collect.
            error.__traceback__ = None
            await sink.fail(error)
        except Exception:
            logger.exception("a request failed inside the gateway")
            await sink.fail(GatewayError())
        finally:
            self.note(scope, request, sink, began)

    def note(self, scope: Scope, request: HttpRequest, sink: HttpSink, began: float) -> None:
        """Count the request as answered; began: monotonic seconds."""
        self.gateway.traffic.note(
            self.route, scope["method"], sink.status, began, request.id, gateway_key=request.key_name
        )

    async def serve(self, scope: Scope, request: HttpRequest, sink: HttpSink) -> None:
        raise NotFound


class ChatConsumer(DataPlaneConsumer):
    """POST /v1/chat/completions"""

    route = "/v1/chat/completions"

    async def serve(self, scope: Scope, request: HttpRequest, sink: HttpSink) -> None:
        await pipeline.chat(self.gateway, request, sink)


class ModelsConsumer(DataPlaneConsumer):
    """GET /v1/models and /v1/models/{id}: what this key may call, from memory."""

    method = "GET"
    route = "/v1/models"

    async def serve(self, scope: Scope, request: HttpRequest, sink: HttpSink) -> None:
        caller = pipeline.admit(self.gateway, request)
        snapshot = self.gateway.watcher.snapshot
        visible = selection.visible_models(snapshot, caller)
        wanted = scope["url_route"]["kwargs"].get("model_id", "").rstrip("/")
        if not wanted:
            await sink.answer(openai.model_list(openai.model(name, owner) for name, owner in visible))
            return
        owner = next((owner for name, owner in visible if name == wanted), None)
        if owner is None:
            raise ModelNotFound(f"There is no model {wanted[:128]} for this key.", param="model")
        await sink.answer(openai.dumps(openai.model(wanted, owner)))


class NothingConsumer(DataPlaneConsumer):
    """Every other path of the data plane: nothing, and a caller without a key is not even told that."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = time.monotonic()
        request = HttpRequest(scope, receive)
        sink = HttpSink(scope, send, request.id)
        try:
            pipeline.admit(self.gateway, request)
            raise NotFound
        except GatewayError as error:
            await sink.fail(error)
        finally:
            self.note(scope, request, sink, began)


@functools.lru_cache(maxsize=4096)
def taken_way(slug: str, model: str, route: str) -> tuple[tuple[bytes, bytes], ...]:
    """The headers that say where an answer comes from."""
    return (
        (b"x-penstock-provider", slug.encode()),
        (b"x-penstock-model", header_text(model)),
        (b"x-penstock-route", header_text(route)),
    )


def header_text(text: str) -> bytes:
    """`text` fit for a header: printable ASCII, bounded."""
    return "".join(c if " " <= c <= "~" else "?" for c in text[:256]).encode()


def retry_after(error: GatewayError | ProviderError) -> tuple[tuple[bytes, bytes], ...]:
    """`Retry-After` in whole seconds, rounded up; 503s always have one."""
    seconds = error.retry_after if error.retry_after is not None else (5 if error.status == 503 else None)
    return () if seconds is None else ((b"retry-after", str(max(1, int(-(-seconds // 1)))).encode()),)


def _length(text: bytes) -> int:
    """What a request says its body has, in bytes; 0 when it does not say."""
    return int(text) if text.isdigit() and len(text) < 19 else 0
