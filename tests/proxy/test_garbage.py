"""A request leaves nothing behind for the garbage collector, which runs so seldom here that it would be kept for minutes."""

from __future__ import annotations

import gc
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from config.connection import Exchange
from config.http_protocol import HttpProtocol
from providers.http1 import Connection, Response
from proxy.attempts import Attempt, Call
from proxy.inflight import Running
from tests.support import answers, faults
from tests.support.inprocess import House
from tests.support.told import listen
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HEAVY = (Attempt, Call, Connection, Exchange, HttpProtocol, Response, Running)
"""What a request takes. Each of them leads to most of the others."""
REQUESTS = 10


@pytest.mark.parametrize(
    ("behave", "more"),
    [
        (answers.ok, {}),
        (answers.ok, {"stream": False}),
        (lambda: answers.status(400), {}),
        (lambda: answers.status(500), {"model": "first/tiny"}),
        (faults.reset_before_headers, {}),
        (lambda: faults.reset_after(3), {"headers": {"x-penstock-resume": "off"}}),
        (lambda: faults.reset_after(3), {}),
    ],
    ids=["stream", "plain", "refused", "failed", "fallback", "interrupted", "resumed"],
)
def test_nothing_that_a_request_took_waits_for_the_collector(
    pair: House, upstream: Upstream, behave: Callable[[], Any], more: dict[str, Any]
) -> None:
    upstream.behave(behave())
    listen(pair.url, pair.key, "warm", **more)

    gc.collect()
    gc.disable()
    try:
        for number in range(REQUESTS):
            listen(pair.url, pair.key, f"cold-{number}", **more)
        while pair.registry.running:
            time.sleep(0.01)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = Counter(type(each).__name__ for each in gc.garbage if type(each) in HEAVY)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()

    assert max(left.values(), default=0) < REQUESTS / 2, left
