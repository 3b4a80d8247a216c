"""What attempts come to, as Prometheus is told."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from providers.wire import Usage
from proxy import metrics
from proxy.consumers import operations
from proxy.gateway import Gateway


def told(name: str, **labels: str) -> float:
    return metrics.registry().get_sample_value(f"penstock_{name}", labels) or 0.0


def test_attempts_are_counted_by_provider_and_outcome_with_their_tokens_and_cost() -> None:
    metrics.attempt("counted", "success", None, Usage(prompt=5, completion=7), 2_000_000_000)
    metrics.attempt("counted", "success", 120, Usage(prompt=1, completion=2), 500_000_000)
    metrics.attempt("counted", "error", None, Usage(), None)
    metrics.attempt("unpriced", "success", None, Usage(prompt=3), None)
    assert told("attempts_total", provider="counted", status="success") == 2
    assert told("attempts_total", provider="counted", status="error") == 1
    assert told("tokens_total", provider="counted", direction="in") == 6
    assert told("tokens_total", provider="counted", direction="out") == 9
    assert told("cost_dollars_total", provider="counted") == 2.5
    assert told("time_to_first_token_seconds_count", provider="counted") == 1
    assert told("time_to_first_token_seconds_sum", provider="counted") == 0.12
    # What was not answered has no price to be known.
    assert told("unpriced_total", provider="counted") == 0
    assert told("unpriced_total", provider="unpriced") == 1


def test_several_who_count_at_once_count_each_attempt_once() -> None:
    for _ in range(5000):
        metrics.attempt("raced", "success", None, Usage(), 0)
    threads = [threading.Thread(target=metrics.count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert told("attempts_total", provider="raced", status="success") == 5000


@pytest.mark.parametrize(
    ("address", "status"),
    [
        ("127.0.0.1", 200),
        ("::1", 200),
        ("::ffff:127.0.0.1", 200),
        ("10.0.0.1", 404),
        ("::ffff:10.0.0.1", 404),
        (None, 404),
    ],
)
async def test_they_are_told_to_neighbours_however_their_address_is_written(
    address: str | None, status: int
) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {"headers": [], "client": (address, 5000) if address else None}
    await operations.metrics(cast(Gateway, None), scope, send)

    assert sent[0]["status"] == status
