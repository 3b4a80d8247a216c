"""How providers feel at this moment, as requests see it: a small picture, apart from the configuration."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from providers.models import JobRun, KeyUse, ProviderHealth
from proxy.models.budgets import warned

BEAT_JOB = "probe_due"


@dataclass(frozen=True, slots=True)
class Weather:
    """down: providers that routing avoids, with the reason. overridden: those a person took out.

    rejected: keys that their provider refused. beat_tick: epoch seconds of the last tick of the scheduler, or None.
    budgets_warned: how many budgets have reached the percentage at which they warn.
    """

    down: Mapping[int, str] = field(default_factory=dict)
    overridden: frozenset[int] = frozenset()
    rejected: frozenset[int] = frozenset()
    beat_tick: float | None = None
    budgets_warned: int = 0
    read_at: float = 0.0


def read(*, budgets: bool = True) -> Weather:
    """Read the verdicts. budgets: whether there are any. Raises DatabaseError when the database is away."""
    down, overridden = {}, set()
    for health in ProviderHealth.objects.filter(is_healthy=False):
        down[health.provider_id] = health.detail or health.status
        if health.override is False:
            overridden.add(health.provider_id)
    tick = JobRun.objects.filter(name=BEAT_JOB).order_by("-tick").values_list("started_at", flat=True).first()
    return Weather(
        down=down,
        overridden=frozenset(overridden),
        rejected=frozenset(KeyUse.objects.exclude(rejected_at=None).values_list("api_key_id", flat=True)),
        beat_tick=tick.timestamp() if tick else None,
        budgets_warned=warned().count() if budgets else 0,
        read_at=time.time(),
    )
