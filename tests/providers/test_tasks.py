"""What the worker does every second: who is probed when, and what happens when there are two of everything, or it dies."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import pytest
import time_machine
from django.db import connection
from django.utils import timezone

from audit.models import Head
from providers import health, tasks
from providers.models import ApiKey, HealthCheck, JobRun, Provider, ProviderHealth, UpstreamModel
from tests.support import faults
from tests.support.answers import ok, status
from tests.support.gateway import PROGRAMS, Gateway
from tests.support.http_server import Exchange
from tests.support.processes import REPOSITORY, Process
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("ring")]

Provide = Callable[..., Provider]
Travel = time_machine.Traveller


@pytest.fixture
def clock() -> Iterator[Travel]:
    """A clock that stands still until it is moved."""
    with time_machine.travel(
        datetime(2030, 1, 1, 12, 0, 30, tzinfo=timezone.get_current_timezone()), tick=False
    ) as moved:
        yield moved


@pytest.fixture
def server(provide: Provide, upstream: Upstream) -> Provider:
    return provide("server", f"{upstream.url}/v1")


def checks(provider: Provider) -> int:
    return HealthCheck.objects.filter(provider=provider).count()


def second(clock: Travel, count: int = 1, runs: int = 1) -> None:
    """Let `count` seconds pass; each is ticked `runs` times."""
    for _ in range(count):
        clock.shift(1)
        for _ in range(runs):
            tasks.probe_due()


def test_a_new_provider_is_probed_at_once_and_then_when_it_is_due(
    server: Provider, clock: Travel, settings: Any
) -> None:
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 10
    second(clock)
    assert ProviderHealth.objects.get(pk=server.pk).health_status == "healthy"
    second(clock, 6)
    assert checks(server) == 1
    second(clock, 7)
    assert checks(server) == 2


def test_disabled_providers_are_not_probed(server: Provider, clock: Travel, upstream: Upstream) -> None:
    Provider.objects.filter(pk=server.pk).update(enabled=False)
    second(clock, 3)
    assert not upstream.ledger.records


def test_nothing_is_probed_when_probes_are_switched_off(
    server: Provider, clock: Travel, upstream: Upstream, settings: Any
) -> None:
    settings.HEALTH_CHECK_ENABLED = False
    second(clock, 3)
    assert not upstream.ledger.records
    assert not ProviderHealth.objects.exists()
    # The scheduler is alive all the same, and that is what its ticks say.
    assert JobRun.objects.filter(name="probe_due").count() == 3


def test_it_is_down_within_the_promised_time_and_back_on_the_first_success(
    server: Provider, clock: Travel, upstream: Upstream, settings: Any
) -> None:
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 10
    settings.HEALTH_CHECK_FAILURE_THRESHOLD = 3
    second(clock)
    upstream.refuse()
    second(clock, (3 + 1) * 10)
    state = ProviderHealth.objects.get(pk=server.pk)
    assert (state.health_status, state.is_healthy, state.status) == ("down", False, "unreachable")
    assert "connect" in state.detail.lower()
    upstream.listen()
    second(clock, 11)
    assert ProviderHealth.objects.get(pk=server.pk).health_status == "healthy"


def test_what_cannot_be_noted_of_one_provider_does_not_stop_the_others(
    provide: Provide, clock: Travel, caplog: pytest.LogCaptureFixture
) -> None:
    providers = [provide(f"p{n}", f"http://127.0.0.1:{n + 1}/v1") for n in range(3)]
    health.ensure_rows()
    # One more than the database can count to.
    _, most = connection.ops.integer_field_range("PositiveIntegerField")
    ProviderHealth.objects.filter(pk=providers[0].pk).update(
        consecutive_failures=most, next_probe_at=health.LONG_AGO - timedelta(days=1)
    )
    second(clock)
    assert [checks(each) for each in providers] == [0, 1, 1]
    assert "provider p0 cannot be noted" in caplog.text


def test_a_provider_that_requests_saw_failing_is_probed_at_once(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    second(clock)
    upstream.on("/models", status(500))
    ProviderHealth.objects.update(next_probe_at=timezone.now())
    second(clock, 2)
    assert ProviderHealth.objects.get(pk=server.pk).status == "degraded"


def test_f30_a_tick_is_taken_once_however_many_beats_there_are(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    for _ in range(5):
        ProviderHealth.objects.update(next_probe_at=timezone.now() - timedelta(seconds=5))
        second(clock, runs=3)
        # A second beat comes a little later in the same second, and there is something due again.
        ProviderHealth.objects.update(next_probe_at=timezone.now() - timedelta(seconds=5))
        clock.shift(0.4)
        tasks.probe_due()
        clock.shift(-0.4)
    assert checks(server) == 5
    assert JobRun.objects.filter(name="probe_due").count() == 5


def test_f30_after_a_pause_of_the_beat_each_provider_is_probed_once(server: Provider, clock: Travel) -> None:
    second(clock)
    clock.shift(3600)
    second(clock, 5)
    assert checks(server) == 2


def test_f29_messages_that_are_delivered_twice_change_nothing(
    server: Provider, clock: Travel, upstream: Upstream, settings: Any
) -> None:
    settings.HEALTH_CHECK_INTERVAL_SECONDS = 5
    upstream.on("/models", status(500))
    second(clock, 2, runs=2)
    state = ProviderHealth.objects.get(pk=server.pk)
    assert (checks(server), state.consecutive_failures) == (1, 1)
    tasks.purge_history()
    tasks.purge_history()
    assert checks(server) == 1


def test_f28_what_a_killed_worker_had_claimed_is_due_again(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    clock.shift(1)
    health.ensure_rows()
    assert tasks._begin_run() is not None
    assert [each.provider for each in tasks._claim(10)] == [server]
    # Here the worker is killed: neither its claim nor its place as the one run is ever given back.
    second(clock, 30)
    assert checks(server) == 0
    second(clock, 32)
    assert checks(server) == 1
    assert not JobRun.objects.filter(name="probe_run").exists()


def test_f31_only_one_run_is_at_work_in_all_workers(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    health.ensure_rows()
    started = tasks._begin_run()
    assert started is not None
    assert tasks._begin_run() is None
    second(clock, 3)
    assert checks(server) == 0
    JobRun.objects.filter(name="probe_run", started_at=started).delete()
    second(clock)
    assert checks(server) == 1


def test_a_run_that_was_overtaken_does_not_end_the_one_that_overtook_it(
    server: Provider, clock: Travel
) -> None:
    first = tasks._begin_run()
    assert first is not None
    clock.shift(tasks.LEASE + timedelta(seconds=1))
    second_run = tasks._begin_run()
    assert second_run is not None
    JobRun.objects.filter(name="probe_run", started_at=first).delete()
    assert tasks._begin_run() is None


def test_f31_a_host_is_asked_once_a_second_whatever_is_behind_it(
    provide: Provide, clock: Travel, upstream: Upstream
) -> None:
    for number in range(5):
        provide(f"tenant {number}", f"{upstream.url}/v1")
    seen = []
    for _ in range(6):
        second(clock)
        seen.append(HealthCheck.objects.count())
    assert seen == [1, 2, 3, 4, 5, 5]


def test_f31_at_most_ten_are_asked_at_once(provide: Provide, clock: Travel) -> None:
    busy, most = 0, 0

    async def slow(exchange: Exchange) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0.15)
        busy -= 1
        await ok()(exchange)

    with ExitStack() as stack:
        for number in range(14):
            running = stack.enter_context(Upstream())
            running.on("/models", slow)
            provide(f"server {number}", f"{running.url}/v1")
        second(clock)
        assert HealthCheck.objects.count() == 14
    assert 2 < most <= tasks.MAX_AT_ONCE


def test_one_provider_that_hangs_does_not_keep_the_others_from_being_seen(
    provide: Provide, clock: Travel, server: Provider, settings: Any
) -> None:
    settings.HEALTH_CHECK_TIMEOUT_SECONDS = 0.3

    async def never(exchange: Exchange) -> None:
        await asyncio.sleep(60)

    with Upstream() as hanging:
        hanging.on("/models", never)
        stuck = provide("stuck", f"{hanging.url}/v1")
        second(clock)
    assert ProviderHealth.objects.get(pk=stuck.pk).status == "timeout"
    assert ProviderHealth.objects.get(pk=server.pk).status == "online"


@pytest.mark.parametrize("seconds", [90, 3600])
def test_f35_a_clock_that_is_set_back_does_not_stop_the_probes(
    server: Provider, clock: Travel, seconds: int
) -> None:
    second(clock, 5)
    before = checks(server)
    clock.shift(-seconds)
    second(clock, 10)
    assert checks(server) == before + 1
    assert ProviderHealth.objects.get(provider=server).last_checked_at <= timezone.now()  # type: ignore[operator]  # it was just asked
    second(clock, 75)
    assert checks(server) == before + 2


def test_f35_a_clock_that_is_set_forward_makes_one_probe_and_no_catch_up(
    server: Provider, clock: Travel
) -> None:
    second(clock)
    before = checks(server)
    clock.shift(3600)
    second(clock, 10)
    assert checks(server) == before + 1


def test_models_are_learnt_when_a_provider_comes_online(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    upstream.on("/models", status(500))
    second(clock)
    assert not UpstreamModel.objects.exists()
    upstream.on("/models", None)
    second(clock, 40)
    assert set(server.upstream_models.values_list("name", flat=True)) == {"big", "tiny"}
    assert checks(server) == 2


def test_models_are_looked_at_again_each_hour_and_not_with_each_probe(
    server: Provider, clock: Travel, upstream: Upstream
) -> None:
    def lists() -> int:
        return len(upstream.ledger.records) - checks(server)

    second(clock)
    assert lists() == 1
    for _ in range(3):
        ProviderHealth.objects.update(next_probe_at=timezone.now())
        second(clock, 2)
    assert lists() == 1
    before = Head.objects.get().seq
    clock.shift(3601)
    second(clock, 2)
    assert lists() == 2
    assert Head.objects.get().seq == before


def test_r06_a_key_that_does_not_open_makes_an_error_and_no_request(
    provide: Provide, clock: Travel, upstream: Upstream
) -> None:
    provider = provide("sealed", f"{upstream.url}/v1", api_key="sk-canary-0123456789abcdef")
    ApiKey.objects.update(secret="v1.00000000.AAAA")
    second(clock, 2)
    assert ProviderHealth.objects.get(pk=provider.pk).status == "error"
    assert not upstream.ledger.records


def test_a_wrong_encryption_key_does_not_stop_the_probes_of_what_needs_none(
    server: Provider, clock: Travel, settings: Any
) -> None:
    from providers import keyring

    settings.PENSTOCK_ENCRYPTION_KEY = b"another key of thirty-two bytes!!"
    keyring._opened_at = None
    second(clock)
    assert ProviderHealth.objects.get(pk=server.pk).status == "online"


def test_history_is_kept_for_seven_days(server: Provider, clock: Travel) -> None:
    now = timezone.now()
    for days in (0.1, 6.9, 7.1, 30):
        HealthCheck.objects.create(provider=server, at=now - timedelta(days=days), status="online")
    HealthCheck.objects.bulk_create(
        HealthCheck(provider=server, at=now - timedelta(days=8), status="online")
        for _ in range(tasks.PURGE_BATCH + 5)
    )
    JobRun.objects.create(name="probe_due", tick=1)
    JobRun.objects.update(started_at=now - timedelta(days=3))
    tasks.purge_history()
    assert checks(server) == 2
    assert not JobRun.objects.exists()


def test_old_ticks_do_not_pile_up(clock: Travel) -> None:
    second(clock, tasks.KEEP_TICKS + 130)
    assert JobRun.objects.filter(name="probe_due").count() <= tasks.KEEP_TICKS + 61


# -- with processes as they are really started -------------------------------------------------------------------------


def another(gateway: Gateway, program: str) -> Process:
    """A second beat or worker of the same installation."""
    words = [*PROGRAMS[program], "--schedule", str(gateway.folder / "second")] if program == "beat" else [
        *PROGRAMS[program], "--hostname=second@%h"
    ]  # fmt: skip
    return Process(words, name=f"second {program}", env=gateway.env, cwd=REPOSITORY)


def wait_for_probes(upstream: Upstream, count: int, timeout: float = 30.0) -> list[float]:
    """Until so many probes have come; when they came."""
    deadline = time.monotonic() + timeout
    while len(times := [record.at for record in upstream.ledger.records if record.path == "/health"]) < count:
        assert time.monotonic() < deadline, f"{len(times)} probes"
        time.sleep(0.05)
    return times


@pytest.mark.alone
@pytest.mark.timeout(200)
def test_f30_f31_with_two_beats_and_two_workers_a_host_is_still_asked_once_a_second() -> None:
    quick = {"HEALTH_CHECK_INTERVAL_SECONDS": "1"}
    with (
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(programs=("worker", "beat"), redis=valkey, env=quick, start=False) as gateway,
    ):
        gateway.provide(upstream.url, kind="vllm", key=False)
        gateway.start()
        with another(gateway, "beat"), another(gateway, "worker"):
            times = wait_for_probes(upstream, 6)
            gateway.kill9("worker")
            gateway.kill9("beat")
            times = wait_for_probes(upstream, len(times) + 3, timeout=90)
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        # What is asked again within a second was asked by somebody who did not know of the first.
        assert min(gaps) > 0.75, gaps
        assert "Traceback" not in gateway.logs("worker") + gateway.logs("beat")


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_f28_a_worker_killed_in_the_middle_of_a_probe_leaves_nothing_running() -> None:
    patient = {"HEALTH_CHECK_TIMEOUT_SECONDS": "15", "HEALTH_CHECK_INTERVAL_SECONDS": "1"}
    with (
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(programs=("worker", "beat"), redis=valkey, env=patient, start=False) as gateway,
    ):
        upstream.on("/health", faults.silence())
        gateway.provide(upstream.url, kind="vllm", key=False)
        gateway.start()
        wait_for_probes(upstream, 1)
        gateway.kill9("worker")
        upstream.on("/health", None)
        gateway.start("worker")
        wait_for_probes(upstream, 3, timeout=150)
