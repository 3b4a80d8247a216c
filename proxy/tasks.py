"""Periodic work of the gateway."""

from __future__ import annotations

import logging
import time

from celery import shared_task

from providers.tasks import take
from proxy import prices

logger = logging.getLogger(__name__)

JOB = "refresh_prices"
DAY = 24 * 3600


@shared_task(name="proxy.tasks.refresh_prices")
def refresh_prices() -> None:
    """Once a day, whoever ticks: take over what the installed price list says otherwise. It asks nobody on the network."""
    if not take(JOB, int(time.time()) // DAY):
        return
    done = prices.refresh(via="task")
    if done.added:
        logger.info("%d new prices from genai-prices %s", done.added, done.package_version)
