"""What the worker does for providers. What is due is a column in the database, so a lost or doubled message does no harm.

`probe_due` is ticked every second. A tick is taken once, by whoever inserts its row; one run at a time, in all workers, claims
what is due and asks at most ten at once. A claim moves `next_probe_at` a minute ahead, so what a killed worker had claimed is
due again by itself.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from celery import shared_task
from django.conf import settings
from django.db import IntegrityError, transaction
from django.db.models import Q, QuerySet
from django.utils import timezone

from audit.changes import changes
from providers import catalog, errors, health, keyring
from providers.models import HealthCheck, JobRun, Provider, ProviderHealth, Verdict
from providers.wire import Credential, Endpoint, Model, Reading, origin_of

logger = logging.getLogger(__name__)

PROBE_JOB = "probe_due"
RUN = "probe_run"
MODELS_JOB = "models"
MAX_AT_ONCE = 10
LEASE = timedelta(seconds=60)
"""No task lives longer (CELERY_TASK_TIME_LIMIT), so whoever claimed something this long ago is dead."""

RUN_SECONDS = 10.0
"""A run begins no further batch after this long; the next tick goes on."""

MAX_TIMEOUT = 15.0
"""A probe and a list of models after it must end within the time limit, whatever the settings say."""

SPACING = timedelta(seconds=1)
"""Between two probes of the same host and port."""

CANDIDATES = 2000
HISTORY = timedelta(days=7)
KEEP_TICKS = 300
LATEST_TICK = 5
"""By how many seconds the clocks of two machines may differ before one of them is taken for wrong."""
KEEP_RUNS = timedelta(days=2)
"""Longer than the tick of any job lasts, the longest being a day."""
MODELS_SECONDS = 3600
PURGE_BATCH = 1000


@shared_task(name="providers.tasks.probe_due")
def probe_due() -> None:
    """Probe the providers that are due, unless somebody does it already."""
    tick = int(time.time())
    if not take(PROBE_JOB, tick):
        # Somebody has it, or had it before the clock was set back: then the ticks to come are free again (F35).
        JobRun.objects.filter(name=PROBE_JOB, tick__gt=tick + LATEST_TICK).delete()
        return
    if tick % 60 == 0:
        JobRun.objects.filter(name=PROBE_JOB, tick__lt=tick - KEEP_TICKS).delete()
    if not settings.HEALTH_CHECK_ENABLED:
        return
    health.ensure_rows()
    if not _due(timezone.now()).exists():
        return
    started = _begin_run()
    if started is None:
        return
    try:
        _run()
    finally:
        JobRun.objects.filter(name=RUN, started_at=started).delete()


@shared_task(name="providers.tasks.purge_history")
def purge_history() -> None:
    """Forget probes older than a week and ticks older than two days, a batch at a time; the next hour does what is left."""
    until = time.monotonic() + RUN_SECONDS
    now = timezone.now()
    while time.monotonic() < until:
        old = list(
            HealthCheck.objects.filter(at__lt=now - HISTORY).values_list("pk", flat=True)[:PURGE_BATCH]
        )
        if not old:
            break
        HealthCheck.objects.filter(pk__in=old).delete()
    JobRun.objects.filter(started_at__lt=now - KEEP_RUNS).delete()


# -- who runs ----------------------------------------------------------------------------------------------------------


def take(name: str, tick: int) -> bool:
    """Whether this tick of this job is ours: the first to insert its row has it."""
    try:
        with transaction.atomic():
            JobRun.objects.create(name=name, tick=tick)
    except IntegrityError:
        return False
    return True


def _begin_run() -> datetime | None:
    """Become the one run there is; None while another one is at work. A dead one's place is free after the lease."""
    now = timezone.now()
    if take(RUN, 0):
        return JobRun.objects.filter(name=RUN, tick=0).values_list("started_at", flat=True).first()
    dead = Q(started_at__lt=now - LEASE) | Q(started_at__gt=now + LEASE)
    overtaken = JobRun.objects.filter(dead, name=RUN, tick=0).update(started_at=now)
    return now if overtaken else None


# -- one run -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Claimed:
    """A provider that is ours to probe now."""

    provider: Provider
    endpoint: Endpoint
    credential: Credential | None


def _run() -> None:
    try:
        keyring.load_if_changed()
    except keyring.WrongEncryptionKey as error:
        # Each credential then says for itself whether it opens.
        logger.error("%s", error)
    until = time.monotonic() + RUN_SECONDS
    while time.monotonic() < until:
        batch = _claim(MAX_AT_ONCE)
        if not batch:
            return
        _probe(batch)


def _due(now: datetime) -> QuerySet[ProviderHealth]:
    """Also those that were asked in the future: the clock was set back since, and nothing would be due for as long (F35)."""
    due = Q(next_probe_at__lte=now) | Q(last_checked_at__gt=now + health.AHEAD)
    return ProviderHealth.objects.filter(due, provider__enabled=True)


def _claim(limit: int) -> list[Claimed]:
    """Take up to `limit` providers that are due, the longest waiting first, and of each host only one that may be asked."""
    now = timezone.now()
    busy = {_host(url) for url in _recently_asked(now)}
    claimed: list[Claimed] = []
    for row in _due(now).select_related("provider").order_by("next_probe_at")[:CANDIDATES]:
        host = _host(row.provider.base_url)
        if host in busy:
            continue
        mine = ProviderHealth.objects.filter(pk=row.pk, next_probe_at=row.next_probe_at).update(
            next_probe_at=now + LEASE
        )
        if mine:
            busy.add(host)
            provider = row.provider
            claimed.append(Claimed(provider, provider.endpoint(), health.probe_credential(provider)))
        if len(claimed) == limit:
            break
    return claimed


def _host(base_url: str) -> str:
    try:
        return origin_of(base_url)
    except ValueError:
        return base_url


def _recently_asked(now: datetime) -> QuerySet[Provider, str]:
    rows = Provider.objects.filter(
        health__last_checked_at__gt=now - SPACING, health__last_checked_at__lte=now
    )
    return rows.values_list("base_url", flat=True)


def _probe(batch: Sequence[Claimed]) -> None:
    """Ask them all at once, note what was seen, and learn the models of those that are due for it."""
    now = timezone.now()
    timeout = min(settings.HEALTH_CHECK_TIMEOUT_SECONDS, MAX_TIMEOUT)
    wanting = []
    for each, reading in zip(batch, asyncio.run(_ask_all(batch, timeout)), strict=True):
        if isinstance(reading, BaseException):
            # A mistake of ours with one provider is no reason to forget the others; its claim runs out.
            logger.error("provider %s cannot be probed", each.endpoint.slug, exc_info=reading)
            continue
        try:
            state = health.record(each.provider.pk, reading, now=now)
        except Exception:
            logger.exception("what was seen of provider %s cannot be noted", each.endpoint.slug)
            continue
        if state is not None and reading.status == "online" and _wants_models(state, now):
            wanting.append(each)
    if wanting:
        _learn_models(wanting, timeout)


async def _ask_all(batch: Sequence[Claimed], timeout: float) -> list[Reading | BaseException]:  # noqa: ASYNC109 - as for upstream.ask
    probes = (health.probe_endpoint(each.endpoint, each.credential, timeout=timeout) for each in batch)
    return await asyncio.gather(*probes, return_exceptions=True)


# -- models ------------------------------------------------------------------------------------------------------------


def _wants_models(state: ProviderHealth, now: datetime) -> bool:
    """When it just came online (a server may come back with another model), and once an hour, not all at the same minute."""
    came_back = (
        state.health_status == Verdict.HEALTHY and state.changed_at is not None and state.changed_at >= now
    )
    name, tick = f"{MODELS_JOB}:{state.pk}", int(now.timestamp() + 61 * state.pk) // MODELS_SECONDS
    due = not JobRun.objects.filter(name=name, tick=tick).exists() and take(name, tick)
    return came_back or due


def _learn_models(batch: Sequence[Claimed], timeout: float) -> None:
    for each, found in zip(batch, asyncio.run(_list_all(batch, timeout)), strict=True):
        if isinstance(found, errors.ProviderError):
            logger.info(
                "models of provider %s cannot be listed: %s", each.endpoint.slug, found.detail or found.text
            )
        elif isinstance(found, BaseException):
            logger.error("models of provider %s cannot be listed", each.endpoint.slug, exc_info=found)
        else:
            with changes(actor=None, via="task"):
                provider = Provider.objects.filter(pk=each.provider.pk).first()
                # It may be gone, or be another server by now.
                if provider is not None and provider.base_url == each.endpoint.base_url:
                    catalog.save_models(provider, found)


async def _list_all(
    batch: Sequence[Claimed],
    timeout: float,  # noqa: ASYNC109 - as for upstream.ask
) -> list[tuple[Model, ...] | BaseException]:
    lists = (catalog.discover(each.endpoint, each.credential, timeout=timeout) for each in batch)
    return await asyncio.gather(*lists, return_exceptions=True)
