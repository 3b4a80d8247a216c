"""How a provider feels: asking a real server, and the state machine behind the verdict."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from django.utils import timezone

from audit.changes import changes
from audit.models import Entry
from providers import health
from providers.models import ApiKey, HealthCheck, Provider, ProviderHealth
from providers.wire import Reading
from tests.support import faults
from tests.support.answers import raw, status, unauthorized
from tests.support.http_server import Behaviour
from tests.support.ports import closed_port
from tests.support.upstream import Trap, Upstream

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("ring")]

KEY = "sk-canary-0123456789abcdef"
ONLINE = Reading("online", 200, "fine", 1.0)
REFUSED = Reading("unreachable", None, "connection refused")

Provide = Callable[..., Provider]


@pytest.fixture
def server(provide: Provide) -> Provider:
    return provide("server", "http://127.0.0.1:9/v1")


def note(provider: Provider, *readings: Reading, at: datetime | None = None) -> ProviderHealth:
    """Record readings, each later than all before; the state after the last."""
    for reading in readings:
        health.record(provider.pk, reading, now=at or timezone.now())
    return ProviderHealth.objects.get(pk=provider.pk)


async def ask(provider: Provider, timeout: float = 5.0, key: ApiKey | None = None) -> Reading:
    return await health.probe_endpoint(
        provider.endpoint(), key.credential() if key else None, timeout=timeout
    )


# -- asking ------------------------------------------------------------------------------------------------------------


def unsaved(upstream: Upstream, **fields: Any) -> Provider:
    return Provider(**{"name": "x", "slug": "x", "base_url": f"{upstream.url}/v1", **fields})


async def test_a_server_that_answers_well_is_online(upstream: Upstream) -> None:
    reading = await ask(unsaved(upstream))
    assert (reading.status, reading.status_code) == ("online", 200)
    assert reading.latency_ms is not None
    assert reading.latency_ms > 0


async def test_a_probe_never_costs_a_completion(upstream: Upstream) -> None:
    for kind in ("vllm", "ollama", "llamacpp", "openai-compatible"):
        await health.test_endpoint(unsaved(upstream, kind=kind).endpoint(), None, timeout=5)
    assert {record.method for record in upstream.ledger.records} == {"GET"}


@pytest.mark.parametrize(
    ("behaviour", "expected", "code"),
    [
        (status(500), "degraded", 500),
        (status(503), "degraded", 503),
        (status(404), "degraded", 404),
        (status(401), "degraded", 401),
        (status(429), "degraded", 429),
        (faults.html(), "degraded", 200),
        (raw(b""), "degraded", 200),
        (faults.empty(), "degraded", 200),
        (faults.silence(), "timeout", None),
        (faults.not_http(), "error", None),
        (faults.huge_json(), "error", None),
        (faults.gzip_bomb(1), "error", None),
    ],
)
async def test_whatever_a_server_does_is_a_reading_and_never_raised(
    upstream: Upstream, behaviour: Behaviour, expected: str, code: int | None
) -> None:
    upstream.on("/models", behaviour)
    reading = await ask(unsaved(upstream), timeout=1.0)
    assert (reading.status, reading.status_code) == (expected, code)
    assert reading.detail or expected == "online"
    assert len(reading.detail) <= health.MAX_DETAIL


async def test_a_server_that_hangs_up_is_not_online(upstream: Upstream) -> None:
    for behaviour in (faults.reset_before_headers(), faults.hang_up_before_headers()):
        upstream.on("/models", behaviour)
        assert (await ask(unsaved(upstream))).status in {"unreachable", "error"}


async def test_a_closed_port_is_unreachable() -> None:
    with closed_port() as port:
        reading = await ask(Provider(name="x", slug="x", base_url=f"http://127.0.0.1:{port}"))
    assert (reading.status, reading.status_code, reading.latency_ms) == ("unreachable", None, None)


async def test_a_server_that_loads_its_model_is_degraded(upstream: Upstream) -> None:
    upstream.on("/health", status(503))
    reading = await ask(unsaved(upstream, kind="llamacpp"))
    assert (reading.status, reading.detail) == ("degraded", "loading the model")


async def test_r23_a_probe_follows_no_redirect(upstream: Upstream) -> None:
    with Trap() as trap:
        upstream.on("/models", faults.redirect(302, f"{trap.url}/v1/models"))
        assert (await ask(unsaved(upstream))).status == "degraded"
        assert not trap.touched


async def test_r19_a_probe_dials_no_metadata_address() -> None:
    reading = await ask(Provider(name="x", slug="x", base_url="http://169.254.169.254/v1"))
    assert reading.status == "error"
    assert "never dialled" in reading.detail


async def test_a_row_that_is_no_address_is_an_error_not_a_crash() -> None:
    for url in ("http://127.0.0.1:99999/v1", "http://[bad/v1", "http://"):
        assert (await ask(Provider(name="x", slug="x", base_url=url))).status == "error"
    assert (
        await ask(Provider(name="x", slug="x", kind="nothing", base_url="http://127.0.0.1:1"))
    ).status == "error"


def test_r01_a_key_that_the_server_repeats_is_not_kept(provide: Provide, upstream: Upstream) -> None:
    upstream.on("/models", unauthorized())
    provider = provide("server", f"{upstream.url}/v1", api_key=KEY)
    reading = health.probe_now(provider)
    assert reading.status == "degraded"
    assert upstream.ledger.last.headers["authorization"] == f"Bearer {KEY}"
    for row in (*ProviderHealth.objects.values(), *HealthCheck.objects.values()):
        assert KEY not in str(row)


def test_r06_a_key_that_does_not_open_is_never_green(provide: Provide, upstream: Upstream) -> None:
    provider = provide("server", f"{upstream.url}/v1", api_key=KEY)
    ApiKey.objects.update(secret="v1.00000000.AAAA")
    reading = health.probe_now(provider)
    assert reading.status == "error"
    assert "credential" in reading.detail
    assert not upstream.ledger.records
    assert ProviderHealth.objects.get(pk=provider.pk).health_status == "degraded"


def test_r06_the_built_in_provider_is_not_green_with_a_bad_key_either(provide: Provide) -> None:
    provider = provide("echo", "https://echo.invalid/v1", kind="echo", api_key=KEY)
    assert health.probe_now(provider).status == "online"
    ApiKey.objects.update(secret="v1.00000000.AAAA")
    assert health.probe_now(provider).status == "error"


def test_a_vendor_without_a_key_is_not_asked(provide: Provide) -> None:
    reading = health.probe_now(Provider.objects.get(slug="openai"))
    assert reading.status == "error"
    assert "needs a key" in reading.detail


async def test_a_test_lists_the_models_too(upstream: Upstream) -> None:
    result = await health.test_endpoint(unsaved(upstream, kind="vllm").endpoint(), None, timeout=5)
    assert (result.status, result.models) == ("online", ["big", "tiny"])
    assert [record.path for record in upstream.ledger.records] == ["/health", "/v1/models"]


async def test_a_test_asks_once_where_the_probe_is_the_list(upstream: Upstream) -> None:
    result = await health.test_endpoint(unsaved(upstream).endpoint(), None, timeout=5)
    assert result.models == ["big", "tiny"]
    assert len(upstream.ledger.records) == 1


async def test_a_test_says_when_a_well_server_lists_no_models(upstream: Upstream) -> None:
    upstream.on("/models", status(500))
    result = await health.test_endpoint(unsaved(upstream, kind="vllm").endpoint(), None, timeout=5)
    assert (result.status, result.models) == ("online", [])
    assert "models cannot be listed" in result.detail


# -- the state machine -------------------------------------------------------------------------------------------------


def test_a_first_good_probe_makes_a_provider_healthy(server: Provider) -> None:
    state = note(server, ONLINE)
    assert (state.status, state.health_status, state.is_healthy) == ("online", "healthy", True)
    assert state.changed_at is not None
    assert list(HealthCheck.objects.values_list("provider", "status", "status_code")) == [
        (server.pk, "online", 200)
    ]


def test_it_is_degraded_below_the_threshold_and_down_at_it(server: Provider, settings: Any) -> None:
    settings.HEALTH_CHECK_FAILURE_THRESHOLD = 3
    seen = []
    for _ in range(4):
        state = note(server, REFUSED)
        seen.append((state.health_status, state.is_healthy, state.consecutive_failures))
    assert seen == [("degraded", True, 1), ("degraded", True, 2), ("down", False, 3), ("down", False, 4)]


@pytest.mark.parametrize("word", ["degraded", "timeout", "unreachable", "error"])
def test_anything_but_online_counts_as_a_failure(server: Provider, settings: Any, word: Any) -> None:
    settings.HEALTH_CHECK_FAILURE_THRESHOLD = 1
    assert note(server, Reading(word)).health_status == "down"


def test_it_recovers_on_the_first_success(server: Provider) -> None:
    note(server, *[REFUSED] * 5)
    state = note(server, ONLINE)
    assert (state.health_status, state.is_healthy, state.consecutive_failures) == ("healthy", True, 0)


def test_an_override_survives_what_probes_see(server: Provider) -> None:
    health.set_override(server, False)
    state = note(server, ONLINE)
    assert (state.status, state.health_status, state.is_healthy) == ("online", "down", False)
    health.set_override(server, True)
    state = note(server, *[REFUSED] * 5)
    assert (state.status, state.health_status, state.is_healthy) == ("unreachable", "healthy", True)


def test_an_override_resets_the_count_and_lifting_it_lets_the_probes_decide(server: Provider) -> None:
    note(server, *[REFUSED] * 3)
    assert health.set_override(server, True).consecutive_failures == 0
    state = health.set_override(server, None)
    assert (state.override, state.health_status, state.is_healthy) == (None, "degraded", True)
    assert state.next_probe_at <= timezone.now()
    assert note(server, REFUSED).consecutive_failures == 1
    health.set_override(server, False)
    assert health.set_override(server, None).is_healthy


def test_an_override_inside_a_change_is_recorded(server: Provider, operator: Any) -> None:
    with changes(actor=operator, via="api"):
        health.set_override(server, False)
    entry = Entry.objects.latest("seq")
    assert (entry.action, entry.username, entry.changes) == (
        "override_server",
        "operator",
        {"is_healthy": [None, False]},
    )
    with changes(actor=operator, via="api"):
        health.set_override(server, False)
    assert Entry.objects.latest("seq") == entry


def test_an_older_probe_never_overwrites_a_newer_one(server: Provider) -> None:
    began = timezone.now()
    note(server, ONLINE, at=began + timedelta(seconds=1))
    assert health.record(server.pk, REFUSED, now=began) is None
    assert health.record(server.pk, REFUSED, now=began + timedelta(seconds=1)) is None
    state = ProviderHealth.objects.get(pk=server.pk)
    assert (state.status, state.consecutive_failures) == ("online", 0)
    assert HealthCheck.objects.count() == 1


def test_a_probe_that_began_before_an_override_does_not_undo_it(server: Provider) -> None:
    began = timezone.now()
    health.set_override(server, False)
    state = note(server, ONLINE, at=began)
    assert (state.override, state.health_status, state.is_healthy) == (False, "down", False)


@pytest.mark.parametrize(
    "meanwhile",
    [
        {"override": False},
        {"consecutive_failures": 7},
        {"last_checked_at": timezone.now()},
        {"next_probe_at": timezone.now()},
    ],
)
def test_a_row_that_changed_since_it_was_read_is_not_written(
    server: Provider, meanwhile: dict[str, Any]
) -> None:
    note(server, REFUSED)
    stale = ProviderHealth.objects.select_related("provider").get(pk=server.pk)
    ProviderHealth.objects.filter(pk=server.pk).update(**meanwhile)
    assert not health._swap(stale, {"consecutive_failures": 0})
    assert ProviderHealth.objects.filter(pk=server.pk, **meanwhile).exists()


def test_what_a_deleted_provider_answered_is_dropped(server: Provider) -> None:
    with changes(actor=None, via="system"):
        Provider.objects.get(pk=server.pk).delete()
    assert health.record(server.pk, ONLINE, now=timezone.now()) is None
    assert not HealthCheck.objects.exists()


def seconds_until_next(provider: Provider, reading: Reading) -> Iterator[float]:
    for _ in range(60):
        began = timezone.now()
        state = note(provider, reading, at=began)
        yield (state.next_probe_at - began).total_seconds()


def test_f31_probes_spread_by_a_fifth_of_the_interval(server: Provider, settings: Any) -> None:
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 60
    waits = list(seconds_until_next(server, ONLINE))
    assert all(48 <= wait <= 72 for wait in waits)
    assert max(waits) > 62
    assert min(waits) < 58


def test_a_failing_provider_is_never_asked_late(server: Provider, settings: Any) -> None:
    """Otherwise the time to `down` would have no bound of (threshold + 1) x interval."""
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 10
    assert all(8 <= wait <= 10 for wait in seconds_until_next(server, REFUSED))


def test_a_failing_provider_is_asked_often_enough_to_see_it_return(server: Provider, settings: Any) -> None:
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 600
    assert all(12 <= wait <= 15 for wait in seconds_until_next(server, REFUSED))


def test_a_provider_may_have_an_interval_of_its_own(provide: Provide) -> None:
    provider = provide("quick", "http://127.0.0.1:9/v1", probe_interval_seconds=2)
    assert all(1.6 <= wait <= 2.4 for wait in seconds_until_next(provider, ONLINE))


@pytest.mark.parametrize("written", [1e12, 1e300])
def test_an_interval_that_was_written_past_the_forms_is_a_day_at_most(
    provide: Provide, written: float
) -> None:
    provider = provide("slow", "http://127.0.0.1:9/v1", probe_interval_seconds=written)
    assert all(wait <= 1.2 * 86400 for wait in seconds_until_next(provider, ONLINE))


def test_a_wish_for_another_probe_that_came_during_one_stays(server: Provider) -> None:
    began = timezone.now() - timedelta(seconds=2)
    health.ensure_rows()
    ProviderHealth.objects.update(next_probe_at=timezone.now() - timedelta(seconds=1))
    assert note(server, ONLINE, at=began).next_probe_at <= timezone.now()


def test_f31_it_is_logged_once_per_change_of_state(
    server: Provider, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="providers.health"):
        note(server, ONLINE, ONLINE, REFUSED, REFUSED, REFUSED, REFUSED, ONLINE, ONLINE)
    words = [record.getMessage().partition(":")[0] for record in caplog.records]
    assert words == [
        "provider server was unknown and is healthy",
        "provider server was healthy and is degraded",
        "provider server was degraded and is down",
        "provider server was down and is healthy",
    ]
