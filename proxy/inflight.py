"""Every running request of this worker: who runs it, since when, and how to end it.

One sweep a second ends those whose key was revoked or whose time is up; there is no timer per chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from proxy.auth import Caller
from proxy.errors import ConcurrencyLimited, GatewayError, KeyRevoked, ShuttingDown

MAX_SOCKETS = 1000
"""Of one key at the same time in this process, whether anything runs on them or not (R38)."""

Ending = Literal["client_left", "key_revoked", "server_shutting_down"]
ENDINGS: dict[str, type[GatewayError]] = {"key_revoked": KeyRevoked, "server_shutting_down": ShuttingDown}


@dataclass(slots=True, eq=False)
class Running:
    """One request while it runs. `end()` cancels it, and `ending` tells the one who catches the cancellation why."""

    task: asyncio.Task[None]
    caller: Caller
    request_id: str
    started: float = field(default_factory=time.monotonic)
    ending: Ending | None = None

    def end(self, ending: Ending) -> None:
        """Once: a second reason changes nothing."""
        if self.ending is None:
            self.ending = ending
            self.task.cancel()

    def error(self) -> GatewayError | None:
        """What the caller is told about the ending; nothing when the caller is the one who left."""
        return ENDINGS[self.ending]() if self.ending in ENDINGS else None


@dataclass(frozen=True, slots=True, eq=False)
class Listener:
    """A connection that wants to be told when it has to end."""

    caller: Caller
    end: Callable[[GatewayError], None]


class Registry:
    """The requests of one worker. Also what the server's shutdown needs: `start`, `interrupt` and `running`."""

    def __init__(self) -> None:
        self._running: set[Running] = set()
        self._listeners: set[Listener] = set()
        self._sockets: Counter[int] = Counter()
        self.draining = False

    @property
    def running(self) -> int:
        return len(self._running)

    def enter(self, caller: Caller, request_id: str) -> Running:
        """Note that the current task serves `caller` from now on; `leave` it in a finally."""
        task = asyncio.current_task()
        assert task is not None
        running = Running(task, caller, request_id)
        self._running.add(running)
        return running

    def leave(self, running: Running) -> None:
        self._running.discard(running)

    @contextmanager
    def listening(self, caller: Caller, end: Callable[[GatewayError], None]) -> Iterator[None]:
        """Have `end` called when the key is revoked or the server stops: for sockets, which stay when nothing runs.

        Raises ConcurrencyLimited when the key has MAX_SOCKETS of them here.
        """
        if self._sockets[caller.id] >= MAX_SOCKETS:
            raise ConcurrencyLimited("This key has reached its limit of open sockets.")
        listener = Listener(caller, end)
        self._sockets[caller.id] += 1
        self._listeners.add(listener)
        try:
            yield
        finally:
            self._listeners.discard(listener)
            self._sockets[caller.id] -= 1
            if not self._sockets[caller.id]:
                del self._sockets[caller.id]

    def start(self) -> None:
        """Shutdown begins: readiness goes off."""
        self.draining = True

    def interrupt(self) -> None:
        """The time for running streams is up: each ends with one honest error."""
        for running in tuple(self._running):
            running.end("server_shutting_down")
        for listener in tuple(self._listeners):
            self._tell(listener, ShuttingDown())

    def sweep(self, is_good: Callable[[Caller], bool]) -> None:
        """End the requests whose key is no longer good."""
        for running in tuple(self._running):
            if not is_good(running.caller):
                running.end("key_revoked")
        for listener in tuple(self._listeners):
            if not is_good(listener.caller):
                self._tell(listener, KeyRevoked())

    def _tell(self, listener: Listener, error: GatewayError) -> None:
        self._listeners.discard(listener)
        listener.end(error)


REGISTRY = Registry()
"""This process's."""
