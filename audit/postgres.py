"""Connections to PostgreSQL that give up on a server which does not answer, and on one that is no longer the primary.

A stopped server (or a frozen machine) keeps its connections open and its kernel goes on acknowledging, so neither
`statement_timeout` nor TCP's own timers end the wait for it. Here every wait looks at the clock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

ANSWER_SECONDS = 20.0
"""Longer than `statement_timeout`, after which a server that lives has answered."""

EVICTING = frozenset({"25006", "57P01", "57P02", "57P03"})
"""read_only_sql_transaction, admin_shutdown, crash_shutdown, cannot_connect_now: the next question goes to a new connection,
which may lead to another server (https://www.postgresql.org/docs/current/errcodes-appendix.html)."""


class Silence:
    """What this process knows of its server. away: it did not answer one who asks all the time; then nobody else waits for it
    until he says that it answers again. at_most: seconds that any wait may last from now on.
    """

    def __init__(self) -> None:
        self.away = False
        self.at_most = ANSWER_SECONDS
        self._own = threading.local()

    @contextmanager
    def patience(self, seconds: float) -> Iterator[None]:
        """This thread waits so long for each answer within the block, whatever is known of the server, and judges for all."""
        before = getattr(self._own, "seconds", None)
        self._own.seconds = seconds
        try:
            yield
        finally:
            self._own.seconds = before

    def given_up(self, waited: float) -> bool:
        own: float | None = getattr(self._own, "seconds", None)
        if own is None:
            return self.away or waited >= self.at_most
        if waited < min(own, self.at_most):
            return False
        self.away = True
        return True


SERVER = Silence()
"""This process's."""


class Connection(psycopg.Connection[Any]):
    """A connection whose questions end in time: with an answer, or with OperationalError and the connection closed."""

    def wait(self, gen: Generator[Any, Any, Any], *args: Any, **options: Any) -> Any:
        """What psycopg waits with for everything but connecting, for which there is `connect_timeout`."""
        try:
            return super().wait(_watched(gen), *args, **options)
        except NoAnswer:
            self.pgconn.finish()
            raise
        except psycopg.Error as error:
            if error.sqlstate in EVICTING:
                self.pgconn.finish()
            raise


class NoAnswer(psycopg.OperationalError):
    """The server took the question and did not answer it in time."""


def _watched(gen: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
    """The same generator; it is sent nothing (0) every tenth of a second that nothing comes, and then we look at the clock."""
    began = time.monotonic()
    try:
        state = next(gen)
        while True:
            ready = yield state
            if not ready and SERVER.given_up(time.monotonic() - began):
                raise NoAnswer("the server does not answer")
            state = gen.send(ready)
    except StopIteration as done:
        return done.value
