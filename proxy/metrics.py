"""Prometheus metrics of the data plane, with label sets that outsiders cannot grow."""

from __future__ import annotations

import os
import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import prometheus_client
from prometheus_client import REGISTRY, CollectorRegistry, Gauge, Histogram, multiprocess

from providers.wire import Usage

if TYPE_CHECKING:
    from proxy.gateway import Gateway

ATTEMPTS = prometheus_client.Counter(
    "penstock_attempts_total", "Attempts at providers, by how they ended.", ["provider", "status"]
)
CACHE = prometheus_client.Counter(
    "penstock_cache_total", "Requests of keys that keep answers, by what was found.", ["result"]
)
REFUSED = prometheus_client.Counter(
    "penstock_refused_total", "Requests refused before any provider was dialled.", ["code"]
)
TOKENS = prometheus_client.Counter(
    "penstock_tokens_total", "Tokens, as counted or estimated.", ["provider", "direction"]
)
COST = prometheus_client.Counter(
    "penstock_cost_dollars_total", "US dollars, where the price is known.", ["provider"]
)
UNPRICED = prometheus_client.Counter(
    "penstock_unpriced_total",
    "Attempts that a provider answered and nobody knows the price of.",
    ["provider"],
)
FIRST_TOKEN = Histogram(
    "penstock_time_to_first_token_seconds",
    "From dialling to the first content of a stream.",
    ["provider"],
    buckets=(0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60),
)
RUNNING = Gauge("penstock_requests_running", "Requests that run now.", multiprocess_mode="livesum")
SILENCE = Gauge(
    "penstock_database_silence_seconds", "Since the database last answered.", multiprocess_mode="livemax"
)
CONFIG = Gauge("penstock_config_version", "The configuration in use.", multiprocess_mode="livemin")
LIMITS_LOCAL = Gauge(
    "penstock_limits_local", "1 while limits are kept by the process alone.", multiprocess_mode="livemax"
)
SPOOL_TROUBLE = Gauge(
    "penstock_spool_trouble", "1 while the usage log cannot be written.", multiprocess_mode="livemax"
)

SHEDDING = Gauge(
    "penstock_shedding", "1 while requests are refused because memory runs out.", multiprocess_mode="livemax"
)
CIRCUITS_OPEN = Gauge(
    "penstock_circuits_open", "Providers that are left alone for a while.", multiprocess_mode="livemax"
)
PRICE_LIST_BROKEN = Gauge(
    "penstock_price_list_broken",
    "1 while the price list cannot be used and prices stay as they were.",
    multiprocess_mode="livemax",
)
BUDGETS_WARNED = Gauge(
    "penstock_budgets_warned",
    "Budgets that have reached the percentage at which they warn.",
    multiprocess_mode="livemax",
)


class Ended(NamedTuple):
    """An attempt that has ended. cost: nano-dollars, None where no price is known."""

    provider: str
    status: str
    ttft_ms: int | None
    usage: Usage
    cost: int | None


_ended: deque[Ended] = deque()
_counting = threading.Lock()  # Between those who count; whoever notes an attempt takes none.


def attempt(provider: str, status: str, ttft_ms: int | None, usage: Usage, cost: int | None) -> None:
    """An attempt has ended. On the hot path: counting it with five locks, or in files where workers share them, is for `count`."""
    _ended.append(Ended(provider, status, ttft_ms, usage, cost))


def count() -> None:
    """Count what was noted: once a second, in a thread, and before anybody reads."""
    with _counting:
        _count([_ended.popleft() for _ in range(len(_ended))])


def _count(ended: Sequence[Ended]) -> None:
    statuses: Counter[tuple[str, str]] = Counter()
    tokens: Counter[tuple[str, str]] = Counter()
    cost: Counter[str] = Counter()
    unpriced: Counter[str] = Counter()
    for each in ended:
        statuses[each.provider, each.status] += 1
        if each.ttft_ms is not None:
            FIRST_TOKEN.labels(each.provider).observe(each.ttft_ms / 1000)
        if each.usage.prompt or each.usage.completion:
            tokens[each.provider, "in"] += each.usage.prompt
            tokens[each.provider, "out"] += each.usage.completion
            if each.cost is None:
                unpriced[each.provider] += 1
        if each.cost:
            cost[each.provider] += each.cost
    for labels, number in statuses.items():
        ATTEMPTS.labels(*labels).inc(number)
    for labels, number in tokens.items():
        TOKENS.labels(*labels).inc(number)
    for provider, number in unpriced.items():
        UNPRICED.labels(provider).inc(number)
    for provider, number in cost.items():
        COST.labels(provider).inc(number / 1_000_000_000)


def weather(gateway: Gateway) -> None:
    """What is measured rather than counted; once a second."""
    RUNNING.set(gateway.registry.running)
    SILENCE.set(gateway.watcher.silence)
    CONFIG.set(gateway.watcher.snapshot.version)
    LIMITS_LOCAL.set(gateway.limits.local)
    SPOOL_TROUBLE.set(gateway.spool.problem is not None)
    SHEDDING.set(gateway.overload.shedding)
    CIRCUITS_OPEN.set(len(gateway.breakers.open()))
    PRICE_LIST_BROKEN.set(gateway.watcher.snapshot.price_list_broken)
    BUDGETS_WARNED.set(gateway.watcher.weather.budgets_warned)


def registry() -> CollectorRegistry:
    """What all workers of this server counted, where there are several, up to a second ago; else what this process did."""
    count()
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return REGISTRY
    shared = CollectorRegistry()
    multiprocess.MultiProcessCollector(shared)  # type: ignore[no-untyped-call]  # it has no types
    return shared
