"""Callers that ask without a pause while a test breaks something; each of their answers is kept."""

from __future__ import annotations

import functools
import http.client
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple, Self

from tests.support.gateway import Gateway
from tests.support.told import Told, listen

JOIN_TIMEOUT = 60.0


class Heard(NamedTuple):
    """An answer, and when it was asked for (`time.monotonic()`)."""

    at: float
    told: Told


class Callers:
    """A context manager: so many threads, each with one request after another, each of those on a connection of its own.

    ask: asks under a name and gives what was told; what it raises is raised when the context ends.
    """

    def __init__(self, ask: Callable[[str], Told], *, count: int, prefix: str = "call") -> None:
        self.heard: list[Heard] = []
        self._ask = ask
        self._names = (f"{prefix}-{number}" for number in itertools.count(1))
        self._naming = threading.Lock()
        self._stop = threading.Event()
        self._errors: list[Exception] = []
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *about: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT)
        if self._errors and kind is None:
            raise self._errors[0]

    @property
    def tolds(self) -> list[Told]:
        return [each.told for each in self.heard]

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                with self._naming:
                    name = next(self._names)
                began = time.monotonic()
                self.heard.append(Heard(began, self._ask(name)))
        except Exception as error:
            self._errors.append(error)


def asking(gateway: Gateway, key: str, **body: Any) -> Callable[[str], Told]:
    """Ask as `told.listen` does. A connection that breaks is no error here: the caller then counts as one who left."""
    return functools.partial(_ask, gateway.url, key, body)


def _ask(url: str, key: str, body: dict[str, Any], name: str) -> Told:
    try:
        told = listen(url, key, name, **body)
    except (OSError, http.client.HTTPException):
        return Told(name, 0, left=True)
    told.left = not told.whole
    return told
