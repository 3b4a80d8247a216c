"""How long usage records are kept. Their sums per hour stay.

Records are forgotten by whole days (UTC) and the oldest first, in short transactions with pauses, so that nobody waits for it.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

from django.conf import settings
from django.utils import timezone

from audit.changes import Identity, changes
from proxy.models import UsageRecord

BATCH = 1000
"""Records of one transaction: a tenth of a second, for which SQLite keeps all other writers waiting."""
MOST_PAUSE = 1.0


def forgotten_before(now: datetime | None = None) -> datetime | None:
    """The day whose records are the oldest that are kept; None while all are kept."""
    if not settings.USAGE_RETENTION_DAYS:
        return None
    today = (now or timezone.now()).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    return today - timedelta(days=settings.USAGE_RETENTION_DAYS)


def forget(*, seconds: float) -> int:
    """Forget the oldest of the records that are too old, for at most about so long; how many. One audit entry tells of it.

    Whoever is stopped in the midst has done what he has done, and the next run goes on.
    """
    limit = forgotten_before()
    if limit is None:
        return 0
    until = time.monotonic() + seconds
    forgotten = 0
    try:
        while time.monotonic() < until:
            began = time.monotonic()
            done = _forget_batch(limit)
            forgotten += done
            if done < BATCH:
                break
            # Others get as much time as we took.
            time.sleep(min(time.monotonic() - began, MOST_PAUSE))
    finally:
        if forgotten:
            _tell(limit, forgotten)
    return forgotten


def _forget_batch(limit: datetime) -> int:
    old = UsageRecord.objects.filter(created_at__lt=limit).order_by("created_at")
    keys = list(old.values_list("pk", flat=True)[:BATCH])
    return UsageRecord.objects.filter(pk__in=keys).delete()[0]


def _tell(limit: datetime, forgotten: int) -> None:
    with changes(actor=None, via="task") as change:
        identity = Identity("usage_records", "", f"before {limit:%Y-%m-%d}", "usage_records")
        change.add(verb="delete", identity=identity, changes={"records": [forgotten, 0]})
