"""The deadlines of one stream with one timer, which looks at the last progress only when it fires."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from providers.errors import Interrupted, ProviderError, Stalled, UpstreamTimeout

KEEPALIVE_SECONDS = 15.0
"""Of silence towards the caller of a committed stream, after which it is told that we are still there."""


class Patience:
    """Use `scope()` around the work. first: until the first content. idle: between reads after it. total: for all of it.

    keep_alive: called when the caller of a committed stream has heard nothing for KEEPALIVE_SECONDS, between events and never
    while one is sent. committed: it already is, since this attempt goes on with a stream that broke.
    """

    def __init__(
        self,
        *,
        first: float,
        idle: float,
        total: float,
        keep_alive: Callable[[], Awaitable[None]],
        committed: bool = False,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit, self._idle = first, idle
        self._last = self._heard = self._loop.time()
        self._end = self._last + total
        self._keep_alive = keep_alive
        self._greeting: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._scope: asyncio.Timeout | None = None
        self._begun = False
        self._committed = committed
        self.sending = False

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

    def _due(self) -> float:
        return min(self._last + self._limit, self._end)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        due = self._due()
        if self._committed:
            due = min(due, self._heard + KEEPALIVE_SECONDS)
        self._timer = self._loop.call_at(due, self._look)

    def _look(self) -> None:
        now = self._loop.time()
        if self.sending:
            # It is the caller who is slow, and the server has a deadline of its own for that.
            self._last = self._heard = now
        if self._due() <= now and self._scope is not None:
            self._scope.reschedule(now)
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

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """Raises UpstreamTimeout, Stalled or Interrupted when a deadline passes inside."""
        try:
            async with asyncio.timeout(None) as self._scope:
                self._arm()
                yield
        except TimeoutError as error:
            raise self._error() from error
        finally:
            self._scope = None
            if self._timer is not None:
                self._timer.cancel()
            if self._greeting is not None:
                self._greeting.cancel()
