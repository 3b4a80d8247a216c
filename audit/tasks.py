"""Every minute the end of the chain is told to places that a database administrator cannot rewrite along with it."""

from __future__ import annotations

import logging

from celery import shared_task
from django.conf import settings

from audit.verify import write_anchor

logger = logging.getLogger(__name__)


@shared_task(name="audit.tasks.anchor_head")
def anchor_head() -> None:
    """Write the head's number and hash to the log and to AUDIT_ANCHOR_FILE, when they changed."""
    head = write_anchor(settings.AUDIT_ANCHOR_FILE)
    if head is not None:
        logger.info("audit head is %s %s", head.seq, head.hash)
