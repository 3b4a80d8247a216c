"""Periodic work on all of it: the tables of packages that do not tidy up by themselves, and the backup of the configuration."""

from __future__ import annotations

import logging
from datetime import timedelta

from axes.models import AccessAttempt, AccessFailureLog, AccessLog
from celery import shared_task
from django.core.management import call_command
from django.utils import timezone

from providers.tasks import take
from proxy.configuration import files

logger = logging.getLogger(__name__)

JOB = "forget_logins"
DAY = 24 * 3600
KEEP_ATTEMPTS = timedelta(days=1)
"""Far longer than AXES_COOLOFF_TIME, after which an attempt counts no more."""


@shared_task(name="config.tasks.forget_logins")
def forget_logins() -> None:
    """Once a day, whoever ticks: forget sessions and refresh tokens that have expired, and old attempts to log in."""
    now = timezone.now()
    if not take(JOB, int(now.timestamp()) // DAY):
        return
    call_command("clearsessions")
    call_command("flushexpiredtokens")
    for model in (AccessAttempt, AccessFailureLog, AccessLog):
        model.objects.filter(attempt_time__lt=now - KEEP_ATTEMPTS).delete()


@shared_task(name="config.tasks.backup_config")
def backup_config() -> None:
    """Write the backup when something changed since the last one and the changes have settled, and once each day.

    Each machine with a worker keeps a file of its own up to date.
    """
    if not files.is_due(timezone.now()):
        return
    try:
        made = files.write()
    except files.NotWritten as error:
        logger.error("backup: %s", error)
        return
    logger.info("backup of configuration %s: %s bytes", made.version, made.bytes)
