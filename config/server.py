"""The server that ``manage.py serve`` runs: uvicorn with our shutdown and our protocols."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import signal
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from types import FrameType
from typing import Any, Protocol

import uvicorn
from uvicorn.lifespan.on import LifespanOn
from uvicorn.server import HANDLED_SIGNALS

from config.connection import Limits, WebSocketProtocol
from config.http_protocol import HttpProtocol

logger = logging.getLogger(__name__)

WEBSOCKET_MESSAGE_BYTES = 1024 * 1024
Application = Callable[[Any, Any, Any], Awaitable[None]]
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class Drain(Protocol):
    """What the server needs to know about the requests of the data plane when it stops."""

    @property
    def running(self) -> int:
        """How many requests are being answered, on sockets of either kind."""

    def start(self) -> None:
        """Readiness goes off; nothing is refused yet."""

    def interrupt(self) -> None:
        """Every running stream ends now, with one error event."""


class Config(uvicorn.Config):
    """uvicorn's configuration as Penstock wants it.

    ``trusted_proxies`` are the peers whose X-Forwarded-For and -Proto are believed; without any, nobody's are.
    """

    def __init__(
        self, app: Application, *, limits: Limits | None = None, trusted_proxies: Sequence[Network | str] = ()
    ) -> None:
        self.limits = limits or Limits()
        self.draining = False
        super().__init__(
            app,
            loop="uvloop",
            http=HttpProtocol,
            ws=WebSocketProtocol,
            ws_max_size=WEBSOCKET_MESSAGE_BYTES,
            ws_ping_interval=20.0,
            ws_ping_timeout=20.0,
            ws_per_message_deflate=False,
            lifespan="on",
            interface="asgi3",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=bool(trusted_proxies),
            forwarded_allow_ips=[str(network) for network in trusted_proxies],
            server_header=False,
            workers=1,
        )

    def load(self) -> None:
        super().load()
        self.lifespan_class = Lifespan


class Lifespan(LifespanOn):
    """uvicorn's lifespan, saying in one line why the application did not start."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.logger = logging.getLogger(f"{__name__}.silent")  # Theirs is a traceback and several lines.
        self.logger.disabled = True
        self._reason = "no reason given"
        self._application = config.loaded_app
        config.loaded_app = self._app

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._application(scope, receive, send)
        except BaseException as exc:
            self._reason = str(exc) or type(exc).__name__
            raise

    async def send(self, message: Any) -> None:
        self._reason = message.get("message") or self._reason
        await super().send(message)

    async def startup(self) -> None:
        await super().startup()
        self.config.loaded_app = self._application
        if self.should_exit:
            logger.critical("Penstock did not start: %s", self._reason)

    async def shutdown(self) -> None:
        await super().shutdown()
        if self.should_exit:
            logger.error("Penstock did not stop cleanly: %s", self._reason)


class Server(uvicorn.Server):
    """uvicorn's server, which on SIGTERM or SIGINT lets what is running come to its end, and then exits with 0.

    The times are those of ``Limits``. A second signal changes nothing.
    """

    config: Config

    def __init__(self, config: Config, *, drain: Drain) -> None:
        super().__init__(config)
        self._drain = drain
        self._sweep_due = 0.0

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Unlike uvicorn's: the signal is not raised again (we exit with 0), and ours stay installed to the end."""
        if threading.current_thread() is threading.main_thread():
            for number in HANDLED_SIGNALS:
                signal.signal(number, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        self._sweep()
        return await super().on_tick(counter)

    def _sweep(self) -> None:
        """End overdue connections; uvicorn ticks ten times a second, which is more than this needs."""
        now = asyncio.get_running_loop().time()
        if now < self._sweep_due:
            return
        self._sweep_due = now + self.config.limits.sweep_seconds
        for connection in list(self.server_state.connections):
            connection.expire(now)  # type: ignore[union-attr]  # Config.__init__ names the two classes.

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Readiness off, grace, close listeners, wait, interrupt, and end in any case."""
        limits, loop = self.config.limits, asyncio.get_running_loop()
        began = loop.time()
        self._exit_at_last(limits.drain_seconds + limits.interrupt_seconds + limits.cleanup_seconds)
        logger.info("Stopping; %d requests are running.", self._drain.running)
        self.config.draining = True
        self._drain.start()
        await self._until(began + limits.grace_seconds, lambda: False)
        self._close_listeners(sockets or [])
        await self._until(began + limits.drain_seconds, self._is_idle)
        if not self._is_idle():
            logger.warning("Interrupting %d requests.", self._drain.running)
            self._drain.interrupt()
            await self._until(loop.time() + limits.interrupt_seconds, self._is_idle)
        await self._end_connections()
        await self.lifespan.shutdown()

    async def _until(self, deadline: float, reached: Callable[[], bool]) -> None:
        loop = asyncio.get_running_loop()
        while not reached() and loop.time() < deadline:
            self._sweep()
            await asyncio.sleep(min(0.05, max(0.0, deadline - loop.time())))

    def _close_listeners(self, sockets: Sequence[socket.socket]) -> None:
        for server in self.servers:
            server.close()
        for sock in sockets:
            sock.close()
        for connection in self._connections(HttpProtocol):
            connection.shutdown()

    def _connections(self, kind: type[Any]) -> list[Any]:
        return [connection for connection in self.server_state.connections if isinstance(connection, kind)]

    def _is_idle(self) -> bool:
        """Whether nobody waits for anything: an open WebSocket alone is one task that never ends by itself."""
        waiting = len(self.server_state.tasks) - len(self._connections(WebSocketProtocol))
        return waiting <= 0 and not self._connections(HttpProtocol) and not self._drain.running

    async def _end_connections(self) -> None:
        """Say 1012 to the WebSockets, give their tasks a moment, and end those that are left."""
        loop = asyncio.get_running_loop()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await self._until(
            loop.time() + self.config.limits.cleanup_seconds / 4, lambda: not self.server_state.tasks
        )
        for task in list(self.server_state.tasks):
            task.cancel()

    def _exit_at_last(self, seconds: float) -> None:
        """Exit with 0 even if the application's lifespan or a thread of it never returns."""
        if threading.current_thread() is threading.main_thread():
            timer = threading.Timer(seconds, os._exit, (0,))
            timer.daemon = True
            timer.start()


def bind(host: str, port: int) -> socket.socket:
    """A bound socket that does not listen yet, so that nobody is accepted before the application is ready.

    Raises ``SystemExit`` with one line for people when the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as exc:
        if exc.errno == errno.EADDRINUSE:
            reason = "is in use; stop what listens there, or choose another with PORT"
        else:
            reason = f"cannot be used: {exc.strerror}"
        raise SystemExit(f"port {port} on {host} {reason}") from None
    return sock
