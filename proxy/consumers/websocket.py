"""Chat over a WebSocket: many requests on one socket, each with the caller's id (contract, section 2.1)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from channels.consumer import AsyncConsumer

from audit.request_ids import REQUEST_ID, request_id_from
from audit.strict_json import StrictJSONError, loads
from providers import sse
from providers.adapters.json_values import dump, parse_object
from providers.adapters.openai import read_event
from providers.errors import ProviderError
from providers.wire import Usage
from proxy import auth, pipeline
from proxy.attempts import Attempt
from proxy.consumers.http import JSON, Receive, Scope, Send, retry_after
from proxy.dialects import openai
from proxy.errors import GatewayError, InvalidRequest, KeyRevoked, NotFound, ShuttingDown
from proxy.gateway import Gateway
from proxy.inflight import Running
from proxy.traffic import CLIENT_LEFT

logger = logging.getLogger(__name__)

PROTOCOL = "penstock.v1"
KEY_PROTOCOL = "penstock.key."
ID = re.compile(r"[\x21-\x7e]{1,64}")
MAX_REQUESTS = 64
"""Requests that may run at the same time on one socket."""

CLOSE_REVOKED, CLOSE_SHUTDOWN, CLOSE_TOO_BIG = 4401, 1012, 1009
MAX_FRAME = 1024 * 1024


class Socket:
    """One connection: its frames out, in order, and whether it is still open."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.open = True

    async def frame(self, **content: Any) -> None:
        if not self.open:
            return
        try:
            await self._send({"type": "websocket.send", "text": dump(content).decode()})
        except OSError:
            # The peer has just left. The one who receives is told so too, and ends what still runs.
            self.open = False

    async def close(self, code: int) -> None:
        if self.open:
            self.open = False
            with contextlib.suppress(OSError):
                await self._send({"type": "websocket.close", "code": code})


class FrameSink:
    """An answer as frames: a chunk for each event, then `done` with the usage.

    wants_usage: whether the caller asked for the chunk that has nothing but the usage. It always comes, for the sake of `done`.
    status: 200 once all of it was sent.
    """

    status = CLIENT_LEFT

    def __init__(self, socket: Socket, id: str, *, wants_usage: bool) -> None:
        self._socket = socket
        self._id = id
        self._wants_usage = wants_usage
        self._attempt: Attempt | None = None
        self._usage: Usage | None = None
        self._tokens = 0
        self.begun = False

    async def begin(self, attempt: Attempt, length: int | None = None) -> None:
        self.begun, self._attempt = True, attempt

    async def send(self, data: bytes) -> None:
        for event in sse.events(data):
            if event.data and event.data.strip() != b"[DONE]":
                await self._chunk(event.data)

    async def _chunk(self, data: bytes) -> None:
        meaning = read_event(data)
        self._usage = meaning.usage or self._usage
        self._tokens += meaning.commits
        if self._wants_usage or not meaning.usage_only:
            await self._socket.frame(id=self._id, type="chunk", data=parse_object(data))

    async def end(self, data: bytes) -> None:
        await self.send(data)
        await self._socket.frame(id=self._id, type="done", usage=self.usage())
        self.status = 200

    def usage(self) -> dict[str, int]:
        """Counts in OpenAI's words: what the stream said, else what the attempt at its beginning counted or estimated.

        A stream that was gone on with says what it all came to, and where it does not, each chunk counts for a token.
        """
        usage = self._usage
        if usage is None:
            counted = self._attempt.counted()[0] if self._attempt is not None else Usage()
            usage = Usage(prompt=counted.prompt, completion=max(counted.completion, self._tokens))
        return {
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "total_tokens": usage.prompt + usage.completion,
        }

    async def keep_alive(self) -> None:
        """The server's pings do that."""

    async def fail(self, error: GatewayError | ProviderError, request_id: str) -> None:
        body = orjson.loads(openai.error(error.status, error.code, error.text, request_id, error.param))
        await self._socket.frame(id=self._id, type="error", **body)


class FrameRequest:
    """One frame as a request for the pipeline; the socket it came on carries the key."""

    key_name = ""

    def __init__(self, scope: Scope, headers: auth.RawHeaders, body: bytes) -> None:
        self._body = body
        self.headers = headers
        self.address = (scope.get("client") or ("",))[0]
        self.id = request_id_from(None)
        self.length = len(body)
        self.resume: bool | None = None
        self.running: Running | None = None

    async def body(self) -> bytes:
        return self._body

    @contextlib.asynccontextmanager
    async def left(self, running: Running) -> AsyncIterator[None]:
        """The socket itself notices when its caller leaves, and ends all its requests."""
        self.running = running
        yield


class ChatSocket(AsyncConsumer):
    """/ws/chat"""

    gateway: Gateway

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] != "websocket.connect":
            return
        headers = with_offered_key(scope)
        with contextlib.ExitStack() as opened:
            try:
                if b"pen_" in scope.get("query_string", b""):
                    raise InvalidRequest("A key never goes into the address.")
                caller = pipeline.admit(self.gateway, FrameRequest(scope, headers, b""))
                conversation = Conversation(self.gateway, scope, headers, Socket(send))
                opened.enter_context(self.gateway.registry.listening(caller, conversation.end))
            except GatewayError as error:
                await refuse(send, error)
                return
            offered = scope.get("subprotocols") or []
            await send({"type": "websocket.accept", "subprotocol": PROTOCOL if PROTOCOL in offered else None})
            await conversation.run(receive)


class NothingSocket(AsyncConsumer):
    """Every other path: nothing. With a gateway, it is the data plane's, and a caller without a key is not even told that."""

    def __init__(self, gateway: Gateway | None = None) -> None:
        self.gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (await receive())["type"] != "websocket.connect":
            return
        try:
            if self.gateway is not None:
                pipeline.admit(self.gateway, FrameRequest(scope, with_offered_key(scope), b""))
            raise NotFound
        except GatewayError as error:
            await refuse(send, error)


class Conversation:
    """The life of an accepted socket: frames in, tasks, frames out."""

    def __init__(self, gateway: Gateway, scope: Scope, headers: auth.RawHeaders, socket: Socket) -> None:
        self._gateway = gateway
        self._scope = scope
        self._headers = headers
        self._socket = socket
        self._requests: dict[str, tuple[asyncio.Task[None], FrameRequest, FrameSink]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def run(self, receive: Receive) -> None:
        try:
            while (message := await receive())["type"] == "websocket.receive":
                await self._take(message)
        finally:
            self._socket.open = False
            await self._end_all()

    async def _take(self, message: dict[str, Any]) -> None:
        text = message.get("text")
        body = text.encode("utf-8", "surrogatepass") if text is not None else message.get("bytes") or b""
        if len(body) > MAX_FRAME:
            await self._socket.close(CLOSE_TOO_BIG)
            return
        try:
            frame = loads(body)
            if not isinstance(frame, dict):
                raise StrictJSONError("A frame is a JSON object.")
        except StrictJSONError as error:
            await self._complain(None, "invalid_json", str(error))
            return
        id, kind = frame.pop("id", None), frame.pop("type", None)
        if not isinstance(id, str) or not ID.fullmatch(id):
            await self._complain(None, "invalid_request", "id is a text of 1 to 64 printable characters.")
        elif kind == "cancel":
            await self._cancel(id)
        elif kind is not None:
            await self._complain(id, "invalid_request", "type is absent, or cancel.")
        elif self._gateway.registry.draining:
            await self._complain(id, ShuttingDown.code, ShuttingDown.message, ShuttingDown.status)
        elif id in self._requests:
            await self._complain(id, "invalid_request", "A request with this id is running.")
        elif len(self._requests) >= MAX_REQUESTS:
            await self._complain(
                id, "concurrency_limit_exceeded", "Too many requests run on this socket.", 429
            )
        else:
            self._begin(id, frame)

    def _begin(self, id: str, frame: dict[str, Any]) -> None:
        options = frame.get("stream_options")
        asked = {**frame, "stream": True}
        wants_usage = False
        if options is None or isinstance(options, dict):
            wants_usage = bool(options and options.get("include_usage"))
            asked["stream_options"] = {**(options or {}), "include_usage": True}
        # Not with orjson, which cannot write every number that a frame may hold.
        body = json.dumps(asked, ensure_ascii=False, separators=(",", ":")).encode()
        request = FrameRequest(self._scope, self._headers, body)
        sink = FrameSink(self._socket, id, wants_usage=wants_usage)
        task = asyncio.create_task(self._serve(id, request, sink))
        self._requests[id] = (task, request, sink)
        # Not in the task itself: one that is cancelled before its first step never comes to its end.
        task.add_done_callback(lambda _: self._requests.pop(id, None))

    async def _serve(self, id: str, request: FrameRequest, sink: FrameSink) -> None:
        began, status = time.monotonic(), CLIENT_LEFT
        REQUEST_ID.set(request.id)
        try:
            await pipeline.chat(self._gateway, request, sink)
            status = sink.status
        except (GatewayError, ProviderError) as error:
            error.__traceback__ = None  # As in `http`: no cycle to collect.
            status = error.status
            await sink.fail(error, request.id)
        except Exception:
            # The other requests on this socket go on.
            logger.exception("a request failed inside the gateway")
            status = GatewayError.status
            await sink.fail(GatewayError(), request.id)
        finally:
            self._gateway.traffic.note(
                "/ws/chat", "WS", status, began, request.id, gateway_key=request.key_name
            )

    async def _cancel(self, id: str) -> None:
        found = self._requests.get(id)
        if found is None:
            await self._complain(id, "not_found", "No request with this id is running.", 404)
            return
        task, request, sink = found
        self._stop(task, request)
        await asyncio.wait({task})
        await self._socket.frame(id=id, type="cancelled", usage=sink.usage())

    @staticmethod
    def _stop(task: asyncio.Task[None], request: FrameRequest) -> None:
        """End a request as one whose caller has left, so that it is recorded as that."""
        if request.running is not None:
            request.running.end("client_left")
        else:
            task.cancel()

    async def _end_all(self) -> None:
        running = list(self._requests.values())
        for task, request, _ in running:
            self._stop(task, request)
        if running:
            await asyncio.wait({task for task, _, _ in running})

    def end(self, error: GatewayError) -> None:
        """The key was revoked, or the server stops: say so, and close. Called by the registry."""
        task = asyncio.get_running_loop().create_task(self._say_goodbye(error))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _say_goodbye(self, error: GatewayError) -> None:
        if running := {task for task, _, _ in self._requests.values()}:
            # Each has its own error frame to send first.
            await asyncio.wait(running, timeout=1)
        await self._complain(None, error.code, error.text, error.status)
        await self._socket.close(CLOSE_REVOKED if isinstance(error, KeyRevoked) else CLOSE_SHUTDOWN)

    async def _complain(self, id: str | None, code: str, message: str, status: int = 400) -> None:
        body = orjson.loads(openai.error(status, code, message, ""))
        await self._socket.frame(id=id, type="error", error=body["error"])


def with_offered_key(scope: Scope) -> list[tuple[bytes, bytes]]:
    """The handshake's headers, with the key that a browser can only offer as a subprotocol."""
    offered = [each for each in scope.get("subprotocols") or [] if each.startswith(KEY_PROTOCOL)]
    return [
        *(pair for pair in scope["headers"] if pair[0] in auth.CARRIERS),
        *((b"x-api-key", each.removeprefix(KEY_PROTOCOL).encode("latin-1", "replace")) for each in offered),
    ]


async def refuse(send: Send, error: GatewayError) -> None:
    """Refuse the upgrade with a status and a body (ASGI's websocket denial response)."""
    body = openai.error(error.status, error.code, error.text, request_id_from(None), error.param)
    length = (b"content-length", str(len(body)).encode())
    headers = [JSON, length, (b"cache-control", b"no-store"), *retry_after(error)]
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": headers})
    await send({"type": "websocket.http.response.body", "body": body})
