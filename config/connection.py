"""What the server allows a connection, the one exchange that runs on it, and the WebSocket it may become."""

import asyncio
import re
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol

from config.http_head import error_body, error_headers

if TYPE_CHECKING:
    from config.server import Config


# Lines of a response's head (RFC 9110, section 5): a token, and a text without control characters except the tab.
HEAD_LINES = re.compile(rb"(?:[!#$%&'*+\-.^_`|~0-9a-z]+: [^\x00-\x08\x0a-\x1f\x7f]*\r\n)*")
WITHOUT_BODY = (204, 304)


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines in seconds and sizes in bytes. A deadline is met at most ``sweep_seconds`` late."""

    head_seconds: float = (
        10.0  # A fresh connection's first head from accept; a later one from its first byte.
    )
    head_bytes: int = 64 * 1024
    body_seconds: float = 30.0
    idle_seconds: float = 75.0  # Longer than clients keep idle connections, so that it is they who close.
    write_seconds: float = 60.0  # Without the reader taking a byte while it is what we wait for.
    linger_seconds: float = 2.0  # For the answer to arrive before unread bytes reset the connection.
    sweep_seconds: float = 1.0
    grace_seconds: float = 2.0  # Still accepting after the signal, until balancers have seen readiness go.
    drain_seconds: float = 30.0  # From the signal until running streams are interrupted.
    interrupt_seconds: float = 3.0  # For interrupted streams to say so and end.
    cleanup_seconds: float = (
        1.5  # For the application to close what it opened, before the process ends anyway.
    )


class Exchange(RequestResponseCycle):
    """One request and its response. An answer given before the body was read closes the connection."""

    _keep_alive = False
    _until_closed = False  # Its body ends with the connection, which is all that HTTP/1.0 knows.

    @property
    def keep_alive(self) -> bool:
        """Read by uvicorn when the response starts (for the header) and when it ends.

        An application that learns only while it answers that this connection must not be used again sets
        `scope["state"]["close"]`: the state is one dict for the request, however often routers copy the scope.
        """
        if self._keep_alive and (self.more_body or self.body or "close" in self.scope["state"]):
            self._keep_alive = False
        return self._keep_alive

    @keep_alive.setter
    def keep_alive(self, value: bool) -> None:
        self._keep_alive = value

    def disconnect(self) -> None:
        """Tell the application that nobody listens any more; what it still sends is dropped.

        An application that does not want to wait for the message keeps a function in `scope["state"]["on_leaving"]`, and looks
        whether `scope["state"]` has `gone` (`proxy.consumers.http.Leaving`).
        """
        if not self.response_complete:
            self.disconnected = True
            state = self.scope["state"]
            state["gone"] = True
            if (tell := state.get("on_leaving")) is not None:
                tell()
        self.message_event.set()

    async def send(self, message: Any) -> None:
        """Write a part of the response. As uvicorn does it, but a head is checked whole and not header by header, which
        for the sixteen of an answer of the data plane costs a third as much.
        """
        if self.flow.write_paused and not self.disconnected:
            await self.flow.drain()
        if self.disconnected:
            return
        if self.response_complete:
            raise RuntimeError("The response is complete already.")
        if self.response_started:
            self._send_body(message.get("body", b""), message.get("more_body", False))
        else:
            self._send_head(message["status"], [*self.default_headers, *message.get("headers", ())])

    def _send_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        lines = b"".join([b"%b: %b\r\n" % header for header in headers])
        good = HEAD_LINES.fullmatch(lines)
        if good is None:
            # Names of ours are in lower case already; Django's are not.
            headers = [(name.lower(), value) for name, value in headers]
            lines = b"".join([b"%b: %b\r\n" % header for header in headers])
            good = HEAD_LINES.fullmatch(lines)
        # A value that holds a line break could pass for two good lines.
        if good is None or lines.count(b"\n") != len(headers):
            raise RuntimeError("A header of the response is not valid.")
        self.response_started = True
        self.waiting_for_100_continue = False
        fields = dict(headers)
        if b"content-length" in fields:
            self.chunked_encoding = False
            self.expected_content_length = int(fields[b"content-length"])
        if b"close" in fields.get(b"connection", b"").lower():
            self.keep_alive = False
        elif not self.keep_alive:
            lines += b"connection: close\r\n"
        if self.chunked_encoding is None and self.scope["method"] != "HEAD" and status not in WITHOUT_BODY:
            if self.scope["http_version"] == "1.0":
                self._until_closed = True
            else:
                self.chunked_encoding = True
                lines += b"transfer-encoding: chunked\r\n"
        self.transport.write(b"%b%b\r\n" % (STATUS_LINE[status], lines))

    def _send_body(self, body: bytes, more_body: bool) -> None:
        if self.scope["method"] == "HEAD":
            self.expected_content_length = 0
        elif self.chunked_encoding:
            chunk = b"%x\r\n%b\r\n" % (len(body), body) if body else b""
            self.transport.write(chunk if more_body else chunk + b"0\r\n\r\n")
        elif self._until_closed:
            self.transport.write(body)
        else:
            self.expected_content_length -= len(body)
            if self.expected_content_length < 0:
                raise RuntimeError("The response is longer than its Content-Length.")
            self.transport.write(body)
        if not more_body:
            self._complete()

    def _complete(self) -> None:
        if self.expected_content_length:
            raise RuntimeError("The response is shorter than its Content-Length.")
        self.response_complete = True
        self.message_event.set()
        if not self.keep_alive:
            self.transport.close()
        self.on_response()

    async def send_500_response(self) -> None:
        """The answer when the application raised before it answered."""
        request_id = uuid.uuid4().hex
        body = error_body(
            "The server failed to answer this request.",
            kind="server_error",
            code="internal_error",
            request_id=request_id,
        )
        headers = error_headers(body, request_id=request_id)
        await self.send({"type": "http.response.start", "status": 500, "headers": headers})
        await self.send({"type": "http.response.body", "body": body, "more_body": False})


class WebSocketProtocol(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket connection, ended by the same sweep when its reader takes nothing any more."""

    config: "Config"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._application, self.app = self.app, self._serve
        self._since = 0.0
        self._unsent = 0

    async def _serve(self, scope: Any, receive: Any, send: Any) -> None:
        await self._application(scope, receive, send)
        # uvicorn takes a handshake that was refused with a body for one that was forgotten, and logs an error.
        self.handshake_complete = self.handshake_complete or self.close_sent

    def handle_parser_exception(self) -> None:
        """Say what was wrong with a frame, and linger: what is still being sent would reset the connection under the answer."""
        if self.close_sent:
            return
        closed = self.conn.close_sent
        assert closed is not None
        self.close_sent = True
        self.queue.put_nowait({"type": "websocket.disconnect", "code": closed.code, "reason": closed.reason})
        self.transport.write(b"".join(self.conn.data_to_send()))
        self.transport.write_eof()
        self.read_paused = False
        self.transport.resume_reading()
        # With a timer running, uvicorn does not close when the application has ended.
        self.close_timer = self.loop.call_later(self.config.limits.linger_seconds, self.transport.close)

    def handle_ping(self) -> None:
        """Who takes nothing gets no more of it: pongs are all that is written here without being waited for."""
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()

    def keepalive_timeout(self) -> None:
        """Who answered no ping will hardly take what is still unsent, so it is not waited for as in other endings."""
        super().keepalive_timeout()
        self.loop.call_later(self.config.limits.linger_seconds, self.transport.abort)

    def expire(self, now: float) -> None:
        """See ``HttpProtocol.expire``; who reads but does not speak is found by uvicorn's pings."""
        if self.writable.is_set() and not self.transport.is_closing():
            self._since = 0.0
        elif self._since == 0.0:
            self._since, self._unsent = now, self.transport.get_write_buffer_size()
        else:
            self._unsent, self._since = expire_writes(
                self.transport, self._unsent, self._since, now, self.config.limits
            )


def expire_writes(
    transport: asyncio.Transport, unsent: int, since: float, now: float, limits: Limits
) -> tuple[int, float]:
    """Abort a transport whose peer took no byte for too long; answer the bytes still unsent, and since when."""
    left = transport.get_write_buffer_size()
    if left < unsent:
        return left, now
    if now - since >= limits.write_seconds:
        transport.abort()
    return left, since
