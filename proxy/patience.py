"""The deadlines of one attempt with one timer, which looks at the last progress only when it fires."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Self

from providers.errors import Interrupted, ProviderError, Stalled, UpstreamTimeout

KEEPALIVE_SECONDS = 15.0
"""Of silence towards the caller of a committed stream, after which it is told that we are still there."""


class Patience:
    """A context manager around the work of `task`, which enters it. first: seconds until the first content. idle: between reads after it. total: for all.

    Leaving it raises UpstreamTimeout, Stalled or Interrupted when a deadline passed inside. It does what `asyncio.timeout`
    does, at a third of the price: a request has one, and most of them never fire.

    keep_alive: called when the caller of a committed stream has heard nothing for KEEPALIVE_SECONDS, between events and never
    while one is sent. committed: it already is, since this attempt goes on with a stream that broke.
    """

    __slots__ = (
        "_begun", "_cancelling", "_committed", "_end", "_finishing", "_fired", "_greeting", "_heard", "_idle", "_keep_alive",
        "_last", "_limit", "_loop", "_task", "_timer", "sending",
    )  # fmt: skip

    def __init__(
        self,
        task: asyncio.Task[None],
        *,
        first: float,
        idle: float,
        total: float,
        keep_alive: Callable[[], Awaitable[None]],
        committed: bool = False,
    ) -> None:
        self._task, self._loop = task, task.get_loop()
        self._limit, self._idle = first, idle
        self._last = self._heard = self._loop.time()
        self._end = self._last + total
        self._keep_alive = keep_alive
        self._greeting: asyncio.Future[None] | None = None
        self._begun = self._finishing = self._fired = self.sending = False
        self._committed = committed

    def __enter__(self) -> Self:
        self._cancelling = self._task.cancelling()
        self._timer = self._loop.call_at(self._next_look(), self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        self._timer.cancel()
        if self._greeting is not None:
            self._greeting.cancel()
        if not self._fired:
            return False
        others = self._task.uncancel() > self._cancelling
        if others or not isinstance(error, asyncio.CancelledError):
            return False  # Somebody else wants the task to end, too, or it ended by itself.
        if self._finishing:
            return True
        raise self._error() from error

    def progress(self) -> None:
        """The upstream has sent something. Before the first content that is no answer: comments and roles do not count."""
        if self._begun:
            self._last = self._loop.time()

    def forwarded(self) -> None:
        """The caller was given something."""
        self.sending = False
        self._heard = self._last  # Read just now: no need to look at the clock again.

    def begun(self) -> None:
        """From now on it is the silence between events that counts."""
        self._begun = self._committed = True
        self._limit = self._idle
        self.progress()
        self._arm()

    def finishing(self, seconds: float) -> None:
        """The answer is complete: what is left of the work may take so long, and is then ended without an error."""
        self._finishing = True
        self._end = self._loop.time() + seconds
        self._arm()

    def _next_look(self) -> float:
        due = min(self._last + self._limit, self._end)
        return min(due, self._heard + KEEPALIVE_SECONDS) if self._committed else due

    def _arm(self) -> None:
        self._timer.cancel()
        self._timer = self._loop.call_at(self._next_look(), self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self.sending:
            # It is the caller who is slow, and the server has a deadline of its own for that.
            self._last = self._heard = now
        if min(self._last + self._limit, self._end) <= now:
            self._fired = True
            self._task.cancel()
            return
        if self._committed and now - self._heard >= KEEPALIVE_SECONDS:
            self._heard = now
            self._greeting = asyncio.ensure_future(self._keep_alive())
        self._arm()

    def _error(self) -> ProviderError:
        if not self._begun:
            return UpstreamTimeout("The provider did not begin to answer in time.")
        if self._loop.time() >= self._end:
            return Interrupted("The stream took longer than is allowed.")
        return Stalled()
