"""What one worker learns about a provider, the others know within two seconds."""

from __future__ import annotations

import time

import pytest

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

QUESTION = {"messages": [{"role": "user", "content": "hello"}]}
TRAVEL_SECONDS = 2.0


def ask(gateway: Gateway, key: str, times: int, *, together: bool) -> set[str]:
    """Who answered; together: on one connection, so that one worker sees them all, else each on its own."""
    seen = set()
    clients = 1 if together else times
    for _ in range(clients):
        with gateway.client(key) as client:
            for _ in range(times // clients):
                response = client.post("/v1/chat/completions", json=QUESTION)
                assert response.status_code == 200, response.text
                seen.add(response.headers["x-penstock-provider"])
    return seen


def test_an_open_circuit_is_known_to_the_other_worker_within_two_seconds() -> None:
    with (
        Valkey() as valkey,
        Upstream(answers.status(503)) as failing,
        Upstream() as healthy,
        Gateway(redis=valkey, env={"WEB_CONCURRENCY": "2"}, start=False) as gateway,
    ):
        gateway.provide(f"{failing.url}/v1", slug="failing", key=False)
        key = gateway.provide(f"{healthy.url}/v1", slug="healthy")
        gateway.start()
        assert ask(gateway, key, 8, together=True) == {"healthy"}
        dialled = len(failing.ledger.asked)
        assert dialled == 5

        time.sleep(TRAVEL_SECONDS)  # the promise itself
        assert ask(gateway, key, 40, together=False) == {"healthy"}
        assert len(failing.ledger.asked) == dialled


def test_a_key_that_is_limited_rests_for_the_other_worker_too() -> None:
    with (
        Valkey() as valkey,
        Upstream(answers.status(429, retry_after=60)) as limiting,
        Upstream() as healthy,
        Gateway(redis=valkey, env={"WEB_CONCURRENCY": "2"}, start=False) as gateway,
    ):
        gateway.provide(f"{limiting.url}/v1", slug="limiting", api_key="sk-limited-0123456789", key=False)
        key = gateway.provide(f"{healthy.url}/v1", slug="healthy")
        gateway.start()
        assert ask(gateway, key, 4, together=True) == {"healthy"}
        assert len(limiting.ledger.asked) == 1

        time.sleep(TRAVEL_SECONDS)  # the promise itself
        assert ask(gateway, key, 30, together=False) == {"healthy"}
        assert len(limiting.ledger.asked) == 1
