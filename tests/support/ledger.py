"""What a scripted upstream saw, kept apart from what anybody says about it: one record for each request."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

WAIT = 5.0


@dataclass(eq=False)
class Record:
    """One request as it arrived, and what became of its answer. Times are `time.monotonic()`.

    connection: the number of the connection it came on. json: the parsed body, None when it is no JSON.
    bytes_sent: of the answer, framing included, as handed to the kernel. chunks_sent: content events, role and end left out.
    closed_by_peer_at: when the caller closed the connection before the answer was complete.
    """

    number: int
    connection: int
    method: str
    path: str
    query: str
    header_items: tuple[tuple[str, str], ...]
    body: bytes
    json: Any
    at: float = field(default_factory=time.monotonic)
    behaviour: str = ""
    status: int | None = None
    bytes_sent: int = 0
    chunks_sent: int = 0
    finished_at: float | None = None
    closed_by_peer_at: float | None = None

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers by lower-case name; of a repeated one, the last."""
        return {name.lower(): value for name, value in self.header_items}

    @property
    def model(self) -> str:
        return str(self.json.get("model", "")) if isinstance(self.json, dict) else ""

    @property
    def done(self) -> bool:
        """Nothing more will be sent: the answer is complete, was broken off, or the caller left."""
        return self.finished_at is not None or self.closed_by_peer_at is not None


class Ledger:
    """Records in order of arrival, and how many connections there were. Safe to read from any thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._records: list[Record] = []
        self.connections = 0
        self.open_connections = 0
        self.errors: list[Exception] = []

    def __len__(self) -> int:
        return len(self.records)

    def __repr__(self) -> str:
        lines = (
            f"\n  {r.method} {r.path} -> {r.behaviour} {r.status}, {r.bytes_sent} bytes" for r in self.records
        )
        return f"<Ledger: {self.connections} connections, {len(self)} requests{''.join(lines)}>"

    @property
    def records(self) -> list[Record]:
        with self._changed:
            return list(self._records)

    @property
    def asked(self) -> list[Record]:
        """The requests that cost something: everything but GET, so no probe and no list of models."""
        return [record for record in self.records if record.method != "GET"]

    @property
    def last(self) -> Record:
        return self.records[-1]

    def clear(self) -> None:
        """Forget the records and the count of connections; connections that are open stay open."""
        with self._changed:
            self._records.clear()
            self.connections = self.open_connections

    def add(self, record: Record) -> None:
        with self._changed:
            self._records.append(record)
            self._changed.notify_all()

    def count_connection(self, change: int) -> int:
        """Note an opened (1) or closed (-1) connection; how many were opened so far."""
        with self._changed:
            self.open_connections += change
            self.connections += change > 0
            self._changed.notify_all()
            return self.connections

    def touch(self) -> None:
        """Wake those who wait: a record changed."""
        with self._changed:
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[Ledger], Any], timeout: float = WAIT) -> None:
        """Block until the condition holds; AssertionError with the ledger's content when it does not in time."""
        deadline = time.monotonic() + timeout
        while not condition(self):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise AssertionError(f"not within {timeout} s: {self!r}")
            with self._changed:
                # The condition may have come true in between: look again soon rather than miss the notification.
                self._changed.wait(min(remaining, 0.02))

    async def until(self, condition: Callable[[Ledger], Any], timeout: float = WAIT) -> None:
        """The same for async tests; their loop goes on running meanwhile."""
        await asyncio.to_thread(self.wait_for, condition, timeout)
