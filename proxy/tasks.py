"""What the worker does for the data plane."""

from __future__ import annotations

import time

from celery import shared_task

from proxy import texts

RUN_SECONDS = 30.0
PURGE_BATCH = 1000


@shared_task(name="proxy.tasks.purge_texts")
def purge_texts() -> None:
    """Forget texts that are older than they are kept, a batch at a time; the next hour does what is left."""
    until = time.monotonic() + RUN_SECONDS
    while texts.purge(most=PURGE_BATCH) == PURGE_BATCH and time.monotonic() < until:
        pass
