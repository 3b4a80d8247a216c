"""A scripted OpenAI-compatible upstream in a thread of its own, usable from sync and async tests alike.

    with Upstream() as upstream:
        upstream.script(status(500), reset_after(3))      # the next two requests; after them it is well again
        ...                                               # a provider with base_url upstream.url + "/v1"
        upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)

What decides how a request is answered, first match wins: a model named `do-<fault>` (see `named.BY_NAME`), a behaviour
set for its path with `on`, the next of the script, the default set with `behave`. Only what is not a GET uses up the script,
so that probes and lists of models do not disturb it.
"""

from __future__ import annotations

import asyncio
import functools
import ssl
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, Self, TypeVar

from tests.support.answers import ok
from tests.support.http_server import Behaviour, Connection
from tests.support.ledger import Ledger, Record
from tests.support.named import by_model
from tests.support.ports import LOOPBACK

T = TypeVar("T")
STOP_TIMEOUT = 5.0


class LoopThread:
    """An event loop that runs in a thread of its own until `stop`."""

    def __init__(self, name: str) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(STOP_TIMEOUT)

    def stop(self) -> None:
        """Cancel what still runs there and end the thread. Nothing happens the second time."""
        if self.loop.is_closed():
            return
        self.run(self._cancel_all())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(STOP_TIMEOUT)
        self.loop.close()

    @staticmethod
    async def _cancel_all() -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Listener:
    """A listening socket on loopback; it may refuse for a while.

    accept: makes the protocol of a connection, which keeps itself in the given set until it is lost.
    """

    def __init__(
        self, accept: Callable[[set[Connection]], Connection], *, name: str, tls: ssl.SSLContext | None = None
    ) -> None:
        self._connections: set[Connection] = set()
        self._accept = functools.partial(accept, self._connections)
        self._tls = tls
        self._thread = LoopThread(name)
        self._server: asyncio.Server | None = None
        self.port = 0
        self.listen()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{LOOPBACK}:{self.port}"

    def listen(self) -> None:
        """Listen, at first on a free port, after `refuse` again on the same one."""
        self._thread.run(self._listen())

    def refuse(self) -> None:
        """Stop listening and break every open connection: new ones are refused until `listen`."""
        self._thread.run(self._refuse())

    def drop_connections(self) -> None:
        """Break every open connection with a reset; new ones are accepted."""
        self._thread.run(self._drop())

    def stop(self) -> None:
        if not self._thread.loop.is_closed():
            self.refuse()
            self._thread.run(self._all_lost())
            self._thread.stop()

    async def _listen(self) -> None:
        if self._server is None:
            loop = asyncio.get_running_loop()
            self._server = await loop.create_server(
                self._accept, LOOPBACK, self.port, ssl=self._tls, backlog=2048
            )
            self.port = self._server.sockets[0].getsockname()[1]

    async def _refuse(self) -> None:
        if self._server is not None:
            # First accept no more, then let what was accepted attach itself: asyncio leaks a connection whose server
            # closed in between.
            for listener in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            await asyncio.sleep(0.001)
            self._server.close()
            self._server = None
        await self._drop()

    async def _drop(self) -> None:
        await asyncio.sleep(0)  # what was accepted just now gets its transport
        for connection in list(self._connections):
            connection.close(reset=True)

    async def _all_lost(self) -> None:
        """Until no connection and no task is left: also one that was accepted while we stopped listening."""
        while len(asyncio.all_tasks()) > 1 or self._connections:
            await self._drop()
            await asyncio.sleep(0.001)


class Upstream(Listener):
    """The scripted upstream. A mistake in a behaviour is raised when the context ends.

    default: what is done with a request that nothing else decides. tls: a server-side context, to speak https.
    """

    def __init__(self, default: Behaviour | None = None, *, tls: ssl.SSLContext | None = None) -> None:
        self.ledger = Ledger()
        self._lock = threading.Lock()
        self._default = default or ok()
        self._script: deque[Behaviour] = deque()
        self._paths: dict[str, Behaviour] = {}
        super().__init__(functools.partial(Connection, self.ledger, self._choose), name="upstream", tls=tls)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.ledger.errors and exception[0] is None:
            raise self.ledger.errors[0]

    def behave(self, behaviour: Behaviour) -> None:
        """Do this with every request from now on; what was scripted is forgotten."""
        with self._lock:
            self._default = behaviour
            self._script.clear()

    def script(self, *behaviours: Behaviour) -> None:
        """Do these with the next requests, one each, before the default."""
        with self._lock:
            self._script.extend(behaviours)

    def on(self, path: str, behaviour: Behaviour | None) -> None:
        """Do this with every request whose path ends so (None: no longer)."""
        with self._lock:
            self._paths.pop(path, None)
            if behaviour is not None:
                self._paths[path] = behaviour

    def reset(self) -> None:
        """Well again, nothing scripted, an empty ledger."""
        with self._lock:
            self._script.clear()
            self._paths.clear()
            self._default = ok()
        self.ledger.clear()

    def _choose(self, record: Record) -> Behaviour:
        asked = by_model(record.model)
        if asked is not None:
            return asked
        with self._lock:
            for path, behaviour in self._paths.items():
                if record.path.endswith(path):
                    return behaviour
            if record.method == "GET":
                return ok()
            return self._script.popleft() if self._script else self._default


class Trap(Upstream):
    """A server that nobody may ever connect to. It answers well, so that whoever does gives away all it would have."""

    @property
    def touched(self) -> bool:
        return self.ledger.connections > 0
