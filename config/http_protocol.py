"""uvicorn's HTTP/1.1 protocol with deadlines, a bounded head and no doubt about framing.

One connection is one ``HttpProtocol``. It keeps no timer: a stage that begins forgets the time (``_since = 0``), and
the server's sweep, once a second, stamps it and ends what is overdue (``expire``), so a request costs no timer at all
and a deadline is met at most one sweep late.
"""

import asyncio
import logging
import urllib.parse
from typing import TYPE_CHECKING, Any, cast

import httptools
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from config.connection import Exchange, Limits, expire_writes
from config.http_head import (
    GUARDED,
    Head,
    RequestRefused,
    origin_form,
    refusal_response,
    require_utf8,
    require_websocket_bounds,
)

if TYPE_CHECKING:
    from config.server import Config

logger = logging.getLogger(__name__)

# A body must bring this much within ``Limits.body_seconds``, or end: one byte now and then is not progress.
BODY_PROGRESS_BYTES = 4096
# With more than this unsent, the application waits until its reader has taken most of it (F16).
WRITE_BYTES = 32 * 1024
# Requests behind the one being answered, from which on a connection is not read from until it is their turn.
MAX_WAITING = 8
OFFER = (b"connection", b"upgrade", b"http2-settings")


class HttpProtocol(HttpToolsProtocol):
    """A connection: the parser's callbacks, the order of pipelined requests, its deadlines and its end."""

    config: "Config"
    cycle: Exchange

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.limits: Limits = self.config.limits
        self._running: Exchange | None = None  # The one being answered; self.cycle is the one last parsed.
        self._refused: RequestRefused | None = None  # To be answered when it is its turn.
        self._head = Head()
        self._fresh = True  # No head has been completed yet.
        self._in_head = False
        self._head_split = False
        self._head_arrived = 0
        self._barren = 0  # Bytes in a row that brought nothing of a body.
        self._feeding = 0
        self._kept_head = b""
        self._deaf = False  # Whatever arrives from now on is not looked at.
        self._lingering = False
        self._websocket = False
        self._offered = False  # The head at hand offers another protocol.
        self._body_progress = 0
        self._since = 0.0
        self._unsent = 0

    # The exchange writes through these three, so that how a connection closes is decided in one place.

    def write(self, data: bytes) -> None:
        """Replaced by the transport's own method as soon as there is one."""
        raise RuntimeError("Not connected.")

    def is_closing(self) -> bool:
        return self._lingering or self.transport.is_closing()

    def close(self) -> None:
        """Close after what was written; linger where what is unread, or comes in the meantime, would make it a reset."""
        self._flush_head()
        running = self._running
        unexpected = running is not None and (running.more_body or "close" in running.scope["state"])
        if self._refused is not None or self.pipeline or unexpected:
            self._linger()
        else:
            self.transport.close()
        self._since = 0.0

    def _linger(self) -> None:
        self._flush_head()
        self._deaf = self._lingering = True
        self._since = 0.0
        self.pipeline.clear()
        if not self.transport.is_closing():
            self.flow.resume_reading()
            self.transport.write_eof()

    # A head goes out together with the first bytes of its body: a write is a system call, and those are what costs.

    def _pass_head(self, data: bytes) -> None:
        """The write of a new exchange: keep its head; an interim answer is not one."""
        if data.startswith(b"HTTP/1.1 100 "):
            self.transport.write(data)
            return
        self._kept_head = data
        self.write = self._write_first  # type: ignore[method-assign]

    def _write_first(self, data: bytes) -> None:
        """The second write: head and body in one; from now on the transport's own method is called."""
        head, self._kept_head = self._kept_head, b""
        self.write = self.transport.write  # type: ignore[method-assign]
        self.transport.write(head + data)

    def _flush_head(self) -> None:
        """An answer that ends without a body, or breaks off before it, still has a head."""
        if self.transport.is_closing():
            return
        if self._kept_head:
            self._write_first(b"")
        self.write = self._pass_head  # type: ignore[method-assign]

    # Connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # As in uvicorn.
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WRITE_BYTES)
        self.write = self._pass_head  # type: ignore[method-assign]  # No check for every chunk: see there.

    def connection_lost(self, exc: Exception | None) -> None:
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnect()
        super().connection_lost(exc)
        # An exchange refers to us, and so does a method of ours: no cycle to collect.
        self._running = self.cycle = None  # type: ignore[assignment]
        self.write = self.transport.write  # type: ignore[method-assign]

    def pause_writing(self) -> None:
        self._since = 0.0
        super().pause_writing()

    def resume_writing(self) -> None:
        self._since = 0.0
        super().resume_writing()

    def shutdown(self) -> None:
        """No further request on this connection: close it now if idle, else after the one under way."""
        running = self._running
        if running is not None and not running.response_complete:
            running.keep_alive = False
        elif not self._in_head:  # Half a head gets its answer: Config.draining makes it the last one.
            self.transport.close()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        unfinished = self._head if self._in_head else None
        self._feeding = len(data)
        self._barren += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            if self._offered:
                self._decline(data[upgrade.args[0] :])
                return
            self._switch(complete=upgrade.args[0] == len(data))
        except httptools.HttpParserError as exc:
            self._refuse(self._reason(exc))
        if self._in_head:
            self._count_head(len(data) if unfinished is self._head else 0)
        else:
            self._count_barren()

    def _count_barren(self) -> None:
        """Bound what brings nothing of a body that is still to come: a trailer, say, which the parser keeps until it is whole, and
        copies each time that there is more of it."""
        wanted = self._running is not None and self.cycle.more_body
        if wanted and self._barren > self.limits.head_bytes and not self._deaf:
            self._refuse(RequestRefused(431, f"{self._barren} bytes came that bring nothing of the body."))

    def _count_head(self, arrived: int) -> None:
        """Bound a head that comes in pieces; its exact size is checked when it is complete."""
        self._head_split = True
        self._head_arrived += arrived
        if self._head_arrived > self.limits.head_bytes and not self._deaf:
            self._refuse(self._head_too_large())

    def _decline(self, rest: bytes) -> None:
        """Take in the head of an offered upgrade once more, as if nothing had been offered (RFC 9110, 7.8): the parser takes what
        follows such a head for the new protocol, and it may be a body."""
        self._offered = False
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        lines = [b"%b: %b" % header for header in self.headers if header[0] not in OFFER]
        self.parser = httptools.HttpRequestParser(self)
        self.data_received(b"\r\n".join([b"%b %b HTTP/%b" % (method, self.url, version), *lines, b"", rest]))

    def _switch(self, *, complete: bool) -> None:
        if not self._websocket:
            self._deaf = True  # The upgrade is ignored, and what follows such a head cannot be told apart.
        elif complete:
            self.handle_websocket_upgrade()
        else:
            self._refuse(RequestRefused(400, "WebSocket frames came before the handshake was answered."))

    def _reason(self, exc: httptools.HttpParserError) -> RequestRefused:
        cause = exc.__context__
        if isinstance(cause, RequestRefused):
            return cause
        if cause is not None:
            logger.error("A request could not be taken in.", exc_info=cause)
            return RequestRefused(400, "The request could not be understood.")
        return RequestRefused(400, f"The request is not valid HTTP/1.1: {exc}.")

    def _head_too_large(self) -> RequestRefused:
        return RequestRefused(431, f"The request head is larger than {self.limits.head_bytes} bytes.")

    # Parser callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = Head()
        self._in_head = True
        self._head_split = False
        self._head_arrived = self._barren = 0
        if not self._fresh:
            self._since = 0.0

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # A trailer: the application has the headers already, and must not find them changed.
        name = name.lower()
        if not value.isascii():
            require_utf8(value)
        if name in GUARDED:
            self._head.note(name, value)
        elif b"_" in name:
            return  # Django and WSGI fold "_" and "-", so X_Real_IP would pass for X-Real-IP.
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser, head, scope = self.parser, self._head, self.scope
        method, version, upgrade = (
            parser.get_method().decode("ascii"),
            parser.get_http_version(),
            parser.should_upgrade(),
        )
        if self._head_split or self._feeding > self.limits.head_bytes:
            self._check_head_bytes()
        head.check(method=method, version=version, upgrade=upgrade)
        if upgrade and head.offers_http2:
            self._offered = True
            return
        self.url = origin_form(self.url, host=head.host)
        scope["method"], scope["http_version"] = method, version
        scope["state"]["on_leaving"] = None  # See Exchange.disconnect.
        raw_path, _, scope["query_string"] = self.url.partition(b"?")
        scope["raw_path"], scope["path"] = raw_path, _decode(raw_path)
        if upgrade and head.wants_websocket(method=method):
            self._check_websocket()
            return
        self._in_head = self._fresh = False
        self._since = 0.0
        self.cycle = Exchange(
            scope=scope,
            transport=cast(asyncio.Transport, self),
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=head.expects_continue and version == "1.1",
            keep_alive=version == "1.1"
            and not (upgrade or self.config.draining)
            and parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        self._body_progress = self._barren = 0
        if self._running is None or self._running.response_complete:
            self._begin(self.cycle)
        else:
            if len(self.pipeline) >= MAX_WAITING:
                self.flow.pause_reading()  # Not before: who is not read from is not noticed when he leaves.
            self.pipeline.appendleft((self.cycle, self.app))

    def _check_head_bytes(self) -> None:
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > self.limits.head_bytes:
            raise self._head_too_large()

    def _check_websocket(self) -> None:
        if self._running is not None and not self._running.response_complete:
            raise RequestRefused(400, "A WebSocket handshake cannot be pipelined.")
        require_websocket_bounds(self.url, self.headers)
        self._websocket = True

    def _begin(self, exchange: Exchange) -> None:
        self._running = exchange
        self._start_asgi_task(exchange, self.app)

    def on_body(self, body: bytes) -> None:
        exchange = self.cycle
        self._barren = 0
        self._body_progress += len(body)
        if self._body_progress >= BODY_PROGRESS_BYTES:
            self._body_progress = 0
            self._since = 0.0
        if exchange.response_complete:
            return
        exchange.body += body
        if len(exchange.body) > HIGH_WATER_LIMIT:
            self.flow.pause_reading()
        exchange.message_event.set()

    def on_message_complete(self) -> None:
        if self._offered:
            return
        if not self._websocket and not self.cycle.response_complete:
            self.cycle.more_body = False
            self.cycle.message_event.set()
            if self.cycle is self._running:
                # A large body may have stopped the reading, and an application that has all of it asks for nothing more:
                # the caller's leaving would go unnoticed.
                self.flow.resume_reading()
        self._since = 0.0

    def on_response_complete(self) -> None:
        self.server_state.total_requests += 1
        self._since = 0.0
        self._flush_head()
        if self._lingering or self.transport.is_closing():
            return
        if self.pipeline:
            self._begin(cast(Exchange, self.pipeline.pop()[0]))
        elif self._refused is not None:
            self._answer_refusal()
        else:
            self.flow.resume_reading()

    # Refusals

    def _refuse(self, refused: RequestRefused) -> None:
        """Answer an unusable request exactly once, in its turn, and close the connection."""
        self._deaf = True
        self._refused = refused
        culprit = None if self._in_head else self.cycle
        self._in_head = False
        logger.info("Refused a request with %d: %s", refused.status, refused.message)
        running = self._running
        if running is None or running.response_complete:
            self._answer_refusal()
        elif culprit is running:
            self._break_off(running)
        elif culprit is not None and self.pipeline and self.pipeline[0][0] is culprit:
            self.pipeline.popleft()

    def _break_off(self, running: Exchange) -> None:
        running.disconnect()
        if running.response_started:
            self._linger()  # Its answer stays visibly incomplete; a second one would be read as the next one.
        else:
            self._answer_refusal()

    def _answer_refusal(self) -> None:
        assert self._refused is not None
        if not self.transport.is_closing():
            self.transport.write(
                refusal_response(self._refused, default_headers=self.server_state.default_headers)
            )
        self._linger()

    # Deadlines

    def expire(self, now: float) -> None:
        """Called by the server's sweep with the loop's time; ends the connection if its stage is overdue."""
        if self._since == 0.0:
            self._since = now
            self._unsent = self.transport.get_write_buffer_size()
            return
        age, limits, running = now - self._since, self.limits, self._running
        if self.flow.write_paused or self.transport.is_closing():
            self._unsent, self._since = expire_writes(self.transport, self._unsent, self._since, now, limits)
        elif self._lingering:
            if age >= limits.linger_seconds:
                self.transport.close()
        elif running is not None and not running.response_complete:
            waiting = running.more_body and not running.response_started and not self.flow.read_paused
            if waiting and age >= limits.body_seconds:
                self._refuse(RequestRefused(408, "The request body did not arrive in time."))
        elif self._in_head:
            if age >= limits.head_seconds:
                self._refuse(RequestRefused(408, "The request head did not arrive in time."))
        elif age >= (limits.head_seconds if self._fresh else limits.idle_seconds):
            # Nothing was asked, so nothing is answered: a client would take it for the answer to its next request.
            self.transport.close()


def _decode(raw_path: bytes) -> str:
    path = raw_path.decode("ascii")
    if "%" in path:
        path = urllib.parse.unquote(path)
        if "\0" in path:
            raise RequestRefused(400, "The request target holds a NUL.")
    return path
