"""A provider that fails again and again is left alone for a while, and tried again by one."""

from __future__ import annotations

from datetime import timedelta

import pytest
from django.utils import timezone

from audit.changes import changes
from providers.models import Provider, ProviderHealth, Status
from proxy.breaker import FAILURES, OPEN_SECONDS, RECOVERY_SECONDS, TRIAL_SECONDS, Breakers
from proxy.cooldown import Cooldowns
from proxy.watcher import Watcher


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def breakers(clock: Clock) -> Breakers:
    return Breakers(clock)


def fail(breakers: Breakers, times: int = FAILURES) -> None:
    for _ in range(times):
        breakers.trying(7)
        breakers.failed(7)


def test_five_failures_in_a_row_open_the_circuit_for_thirty_seconds(breakers: Breakers, clock: Clock) -> None:
    fail(breakers, FAILURES - 1)
    assert not breakers.open()
    fail(breakers, 1)
    assert breakers.open() == {7: OPEN_SECONDS}
    clock.now += OPEN_SECONDS
    assert not breakers.open()


def test_a_success_in_between_begins_the_count_anew(breakers: Breakers) -> None:
    fail(breakers, FAILURES - 1)
    breakers.succeeded(7)
    fail(breakers, FAILURES - 1)
    assert not breakers.open()


def test_what_was_under_way_when_it_opened_does_not_keep_it_open_longer(breakers: Breakers) -> None:
    fail(breakers)
    for _ in range(100):
        breakers.failed(7)
    assert breakers.open() == {7: OPEN_SECONDS}


def test_half_open_one_tries_and_the_others_wait_for_it(breakers: Breakers, clock: Clock) -> None:
    fail(breakers)
    clock.now += OPEN_SECONDS
    breakers.trying(7)
    assert breakers.open()
    breakers.succeeded(7)
    assert not breakers.open()


def test_each_opening_lasts_longer_and_none_longer_than_five_minutes(
    breakers: Breakers, clock: Clock
) -> None:
    fail(breakers)
    lasted = []
    for _ in range(12):
        clock.now += breakers.open()[7]
        fail(breakers, 1)
        lasted.append(breakers.open()[7])
    assert lasted[:3] == [60.0, 90.0, 120.0] and lasted[-1] == 300.0


def test_a_trial_that_was_called_off_leaves_the_next_one_soon(breakers: Breakers, clock: Clock) -> None:
    fail(breakers)
    clock.now += OPEN_SECONDS
    breakers.trying(7)
    breakers.called_off(7)
    assert breakers.open() == {7: TRIAL_SECONDS}


def test_an_open_circuit_may_be_forced_once_a_second(breakers: Breakers, clock: Clock) -> None:
    fail(breakers)
    clock.now += TRIAL_SECONDS
    assert breakers.may_force(7)
    breakers.trying(7)
    assert not breakers.may_force(7)
    clock.now += TRIAL_SECONDS
    assert breakers.may_force(7)


def test_a_probe_that_finds_it_well_lets_one_try_but_not_at_once(breakers: Breakers, clock: Clock) -> None:
    """What answers its probes and fails at its work would else be tried as often as it is probed."""
    fail(breakers)
    breakers.recovered(7)
    assert breakers.open()
    clock.now += RECOVERY_SECONDS
    assert breakers.opened() == {7: RECOVERY_SECONDS}
    breakers.recovered(7)
    assert not breakers.open()
    fail(breakers, 1)
    assert breakers.open() and not breakers.opened()


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("status", "ago", "told"),
    [(Status.ONLINE, 5, True), (Status.ONLINE, 60, False), (Status.UNREACHABLE, 5, False)],
)
def test_the_watcher_tells_of_a_good_probe_that_is_newer_than_the_opening(
    status: str, ago: int, told: bool
) -> None:
    with changes(actor=None, via="system"):
        provider = Provider.objects.create(name="one", kind="vllm", base_url="http://127.0.0.1:9")
    checked = timezone.now() - timedelta(seconds=ago)
    ProviderHealth.objects.update_or_create(
        provider=provider, defaults={"status": status, "last_checked_at": checked}
    )
    heard: list[int] = []
    watcher = Watcher()
    watcher.opened = lambda: {provider.pk: 30.0}
    watcher.recovered = heard.append
    watcher._look_for_recoveries()
    assert heard == ([provider.pk] if told else [])


def test_a_limited_key_rests_as_long_as_its_provider_says_within_bounds(clock: Clock) -> None:
    cooldowns = Cooldowns(clock)
    for said, rests in ((12.0, 12.0), (0.0, 1.0), (1e9, 300.0)):
        assert cooldowns.limited(3, said) == rests
    assert cooldowns.resting() == {3: 300.0}
    clock.now += 300
    assert not cooldowns.resting()


def test_a_provider_that_does_not_say_is_left_alone_twice_as_long_each_time(clock: Clock) -> None:
    cooldowns = Cooldowns(clock)
    for rests in (1, 2, 4, 8, 16, 30, 30):
        assert cooldowns.limited(3, None) == rests
        clock.now += rests
    assert not cooldowns.resting()
    cooldowns.limited(3, None)
    cooldowns.accepted(3)
    assert not cooldowns.resting()
    assert cooldowns.limited(3, None) == 1


def test_requests_that_were_on_their_way_together_are_refused_once(clock: Clock) -> None:
    cooldowns = Cooldowns(clock)
    assert {cooldowns.limited(3, None) for _ in range(8)} == {1.0}
    clock.now += 1
    assert {cooldowns.limited(3, None) for _ in range(8)} == {2.0}
