"""The one thread that reads the database for the data plane: configuration, weather, and back what requests saw.

Requests never wait for it. It looks at `audit.Head` four times a second and rebuilds the snapshot at most twice. No
publish/subscribe: a poll is needed anyway, in case a message is lost, and is fast enough.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping

from django.db import DatabaseError, InterfaceError, OperationalError, close_old_connections, connection
from django.utils import timezone

from audit import postgres
from audit.changes import AuditUnavailable
from audit.models import Head
from providers.keyring import WrongEncryptionKey
from providers.keys import note_undecryptable
from providers.models import ApiKey, KeyUse, ProviderHealth, Status
from proxy import snapshot as snapshots
from proxy import weather as weathers
from proxy.snapshot import Snapshot
from proxy.weather import Weather

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.25
REBUILD_SECONDS = 0.5
"""Together less than the second in which a revoked key has to stop working, everywhere."""

WEATHER_SECONDS = 1.0
GRACE_SECONDS = 300.0
"""How long the data plane serves from memory while the database is away (F22); then it refuses with 503."""

FRESH_SECONDS = 5.0

ANSWER_SECONDS = 0.8
"""A server that takes longer for a one-row question is away, as far as people who wait for a page are concerned."""

BUILD_ANSWER_SECONDS = 5.0
"""The same for each of the questions that a snapshot is made of, which may have 10,000 rows."""


class Watcher:
    """Holds the current `snapshot` and `weather`; both are replaced whole, so readers need no lock.

    on_change: called in the watcher's thread after a new snapshot is there. swap: called there once a second, to exchange
    with other workers what was seen. opened, recovered: which circuits are open, and since how many seconds; and whom to
    tell that a probe has found such a provider well since.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._suspects: set[int] = set()
        self._rejected: set[int] = set()
        self._accepted: set[int] = set()
        self._undecryptable: set[int] = set()
        self._unrecorded = False
        self._built_at = self._weather_at = 0.0
        self.answered_at = 0.0
        self.read_only = False
        self.snapshot = Snapshot()
        self.weather = Weather()
        self.on_change: Callable[[], object] = lambda: None
        self.swap: Callable[[], object] = lambda: None
        self.opened: Callable[[], Mapping[int, float]] = dict
        self.recovered: Callable[[int], object] = lambda provider_id: None

    # -- asked by requests -------------------------------------------------------------------------------------------

    @property
    def silence(self) -> float:
        """Seconds since the database last answered."""
        return self._clock() - self.answered_at

    @property
    def fresh(self) -> bool:
        """Whether what is not in the snapshot certainly does not exist."""
        return self.silence < FRESH_SECONDS

    @property
    def usable(self) -> bool:
        """Whether the configuration may still be served from memory."""
        return self.silence < GRACE_SECONDS

    def suspect(self, provider_id: int) -> None:
        """A request saw this provider fail: have it probed at once."""
        self._suspects.add(provider_id)

    def rejected(self, key_id: int) -> None:
        """The provider refused this key."""
        self._rejected.add(key_id)

    def accepted(self, key_id: int) -> None:
        """The provider took a key that was marked as refused."""
        self._accepted.add(key_id)

    def undecryptable(self, key_id: int) -> None:
        """What is stored for this key did not open (R03)."""
        self._undecryptable.add(key_id)

    # -- the thread --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Read everything once, here and now (DatabaseError when that fails), then keep it fresh in a thread."""
        self.refresh()
        self._thread = threading.Thread(target=self._run, name="penstock-watcher", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def refresh(self) -> None:
        """One look at the database; rebuilds what is due. Raises DatabaseError when it is away."""
        now = self._clock()
        with postgres.SERVER.patience(ANSWER_SECONDS):
            version = Head.objects.values_list("seq", flat=True).get(pk=1)
        postgres.SERVER.away = False
        # `!=`, not `>`: after a restore from a backup the number may be lower.
        changed = version != self.snapshot.version or not self._built_at
        if changed and (not self._built_at or now - self._built_at >= REBUILD_SECONDS):
            with postgres.SERVER.patience(BUILD_ANSWER_SECONDS):
                self.snapshot = snapshots.build()
            self._built_at = now
            self.on_change()
        with postgres.SERVER.patience(ANSWER_SECONDS):
            weather_due = now - self._weather_at >= WEATHER_SECONDS
            if weather_due:
                self.weather = weathers.read(budgets=bool(self.snapshot.budgets))
                self.read_only = _is_read_only()
                self._weather_at = now
                self._look_for_recoveries()
            # What was read is good, also where nothing can be written back.
            self.answered_at = self._clock()
            self._report()
        if weather_due:
            self._record_undecryptable()

    def _look_for_recoveries(self) -> None:
        opened = self.opened()
        if not opened:
            return
        well = ProviderHealth.objects.filter(provider__in=opened, status=Status.ONLINE).exclude(
            last_checked_at=None
        )
        now = timezone.now()
        for provider_id, checked_at in well.values_list("provider_id", "last_checked_at"):
            if checked_at is not None and (now - checked_at).total_seconds() < opened[provider_id]:
                self.recovered(provider_id)

    def _report(self) -> None:
        """Write back what requests saw; what cannot be written is kept for the next look."""
        suspects, rejected, accepted = set(self._suspects), set(self._rejected), set(self._accepted)
        if suspects:
            ProviderHealth.objects.filter(provider__in=suspects, next_probe_at__gt=timezone.now()).update(
                next_probe_at=timezone.now()
            )
            self._suspects -= suspects
        # One may be deleted by now, and would hold up the others for ever.
        for key_id in ApiKey.objects.filter(pk__in=rejected).values_list("pk", flat=True):
            KeyUse.objects.update_or_create(api_key_id=key_id, defaults={"rejected_at": timezone.now()})
        if accepted:
            KeyUse.objects.filter(api_key__in=accepted).update(rejected_at=None)
        self._rejected -= rejected
        self._accepted -= accepted

    def _record_undecryptable(self) -> None:
        """Mark the keys that did not open, and tell the audit log. Where that fails nothing else does; it is tried again."""
        keys = set(self._undecryptable)
        try:
            # Another change may hold the audit log's head for as long as a lock is waited for: no sign of a server that is away.
            with postgres.SERVER.patience(BUILD_ANSWER_SECONDS):
                for key_id in keys:
                    if note_undecryptable(key_id):
                        logger.error("what is stored for API key %d does not open", key_id)
        except (AuditUnavailable, DatabaseError, WrongEncryptionKey) as error:
            if not self._unrecorded:
                logger.warning("a key that does not open could not be recorded: %s", error)
            self._unrecorded = True
            return
        self._unrecorded = False
        self._undecryptable -= keys

    def _swap_safely(self) -> None:
        """This thread must outlive whatever goes wrong with hearsay."""
        try:
            self.swap()
        except Exception:
            logger.exception("workers do not hear of each other")

    def _run(self) -> None:
        failing = False
        swapped_at = 0.0
        while not self._stop.wait(POLL_SECONDS):
            if self._clock() - swapped_at >= WEATHER_SECONDS:
                self._swap_safely()
                swapped_at = self._clock()
            try:
                if connection.vendor != "sqlite":
                    close_old_connections()  # A file cannot move to another host, and opening it costs more than reading it.
                self.refresh()
                if failing:
                    logger.warning("the database answers again")
                failing = False
            except Exception as error:
                if not failing:
                    # Of a mistake of ours the place is needed; a database that is away is told in a line.
                    trace = None if isinstance(error, DatabaseError) else error
                    logger.warning("configuration is served from memory: %s", error, exc_info=trace)
                failing = True
                self._judge(error)
                _drop_connection()
        _drop_connection()

    def _judge(self, error: Exception) -> None:
        """Whether the server is away for longer than a restart takes, so that nobody else need find out for himself."""
        away = isinstance(error, OperationalError | InterfaceError) and not self.fresh
        if away and connection.vendor == "postgresql":
            postgres.SERVER.away = True


def _is_read_only() -> bool:
    """Whether we reach a standby, or a server that takes no writes: reading goes on and nobody else would notice (F24)."""
    if connection.vendor != "postgresql":
        return False
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_is_in_recovery() OR current_setting('default_transaction_read_only')::bool")
        return bool(cursor.fetchone()[0])


def _drop_connection() -> None:
    with contextlib.suppress(DatabaseError):
        connection.close()


WATCHER = Watcher()
"""This process's."""
