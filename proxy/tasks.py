"""Periodic work of the gateway."""

from __future__ import annotations

import logging
import time

from celery import shared_task

from providers.tasks import take
from proxy import prices, retention

logger = logging.getLogger(__name__)

DAY = 24 * 3600
TICK_SECONDS = 300
RUN_SECONDS = 40.0
"""Less than the time limit of tasks (CELERY_TASK_SOFT_TIME_LIMIT); the next tick goes on with what is left."""


@shared_task(name="proxy.tasks.refresh_prices")
def refresh_prices() -> None:
    """Once a day, whoever ticks: take over what the installed price list says otherwise. It asks nobody on the network."""
    if not take("refresh_prices", int(time.time()) // DAY):
        return
    done = prices.refresh(via="task")
    if done.added:
        logger.info("%d new prices from genai-prices %s", done.added, done.package_version)


@shared_task(name="proxy.tasks.forget_usage")
def forget_usage() -> None:
    """Forget usage records that are older than USAGE_RETENTION_DAYS; every tick is taken once, by whoever comes first."""
    if retention.forgotten_before() is None or not take("forget_usage", int(time.time()) // TICK_SECONDS):
        return
    forgotten = retention.forget(seconds=RUN_SECONDS)
    if forgotten:
        logger.info("forgot %d usage records older than %s", forgotten, retention.forgotten_before())
