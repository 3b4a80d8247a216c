"""How providers feel: asking them, and one place that turns what was seen into a verdict.

The state machine is `record` (a probe) and `set_override` (a person). Both change the row only while it is still the one that
was read, so an older probe never overwrites a newer one, nor a person's word.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import random
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar

from asgiref.sync import async_to_sync
from django.conf import settings
from django.db import transaction
from django.utils import timezone

from audit.changes import NotInChanges
from audit.changes import record as audit_record
from providers import adapters, catalog, errors, keyring, upstream
from providers.models import ApiKey, HealthCheck, Provider, ProviderHealth, Status, Verdict
from providers.models.provider import MOST_SECONDS
from providers.wire import Answer, Credential, Endpoint, ProbeStatus, Reading

logger = logging.getLogger(__name__)

JITTER = 0.2
"""Part of the interval by which probes are spread, so that those that began together do not stay together."""

RECOVERY_SECONDS = 15.0
"""A provider that fails is asked at least so often, so that its return is noticed within 30 s."""

AHEAD = timedelta(seconds=60)
"""By how much the clocks of two machines may differ before one of them is taken for wrong."""

LONG_AGO = datetime(2000, 1, 1, tzinfo=UTC)
"""When a new row was due: before any probe of it can have begun."""

MAX_DETAIL = 500
_PATIENCE = 20
"""Attempts to write a row that others keep changing. Each lost one means that another was won."""


@dataclass(frozen=True, slots=True)
class TestResult:
    """What a test of an endpoint saw. `models` are the names it lists; empty when it does not answer or list any."""

    __test__: ClassVar[bool] = False  # not a test, whatever its name says

    status: ProbeStatus
    status_code: int | None = None
    latency_ms: float | None = None
    detail: str = ""
    models: list[str] = field(default_factory=list)


# -- asking ------------------------------------------------------------------------------------------------------------


async def probe_endpoint(endpoint: Endpoint, credential: Credential | None, *, timeout: float) -> Reading:  # noqa: ASYNC109 - as for upstream.ask
    """Ask the cheapest question that tells whether the endpoint is well; at most `timeout` seconds.

    Never raises for what the network or the credential does. The process's keyring must be loaded (`keyring.load_if_changed`).
    """
    reading, _ = await _probe(endpoint, credential, timeout)
    return reading


async def test_endpoint(endpoint: Endpoint, credential: Credential | None, *, timeout: float) -> TestResult:  # noqa: ASYNC109 - as for upstream.ask
    """Probe the endpoint and list its models, in `timeout` seconds together. Saves nothing, never raises for the network."""
    began = time.monotonic()
    reading, answer = await _probe(endpoint, credential, timeout)
    names: list[str] = []
    detail = reading.detail
    if reading.status == "online":
        try:
            left = max(0.1, timeout - (time.monotonic() - began))
            found = catalog.listed_in(endpoint, answer) or await catalog.discover(
                endpoint, credential, timeout=left
            )
            names = [model.id for model in found]
        except errors.ProviderError as error:
            detail = f"{detail} Its models cannot be listed: {_words(error)}".strip()
    return TestResult(reading.status, reading.status_code, reading.latency_ms, detail[:MAX_DETAIL], names)


test_endpoint.__test__ = False  # type: ignore[attr-defined]  # not a test, whatever its name says


async def _probe(
    endpoint: Endpoint,
    credential: Credential | None,
    timeout: float,  # noqa: ASYNC109 - as for upstream.ask
) -> tuple[Reading, Answer | None]:
    began = time.monotonic()
    try:
        kind = adapters.kind(endpoint.kind)
        if kind.probe is None:
            return Reading("unknown", detail="This kind of provider cannot be probed."), None
        if kind.local is not None and credential is not None:
            # Nothing is sent, so nobody else would notice that the credential does not open (R06).
            await upstream.open_secret(credential, origin=endpoint.origin)
        answer = await upstream.ask(
            endpoint, catalog.built(kind.probe.request, endpoint), credential=credential, timeout=timeout
        )
        reading = kind.probe.read(answer)
    except errors.ProviderError as error:
        return reading_of(error), None
    latency = round((time.monotonic() - began) * 1000, 1)
    return dataclasses.replace(reading, latency_ms=latency, detail=reading.detail[:MAX_DETAIL]), answer


_STATUS: tuple[tuple[type[errors.ProviderError], ProbeStatus], ...] = (
    (errors.UpstreamTimeout, "timeout"),
    (errors.ConnectFailed, "unreachable"),
    (errors.UpstreamRedirect, "degraded"),
)


def reading_of(error: errors.ProviderError) -> Reading:
    """What went wrong, as a reading. `error` also stands for what keeps us from asking: a credential that does not open."""
    status: ProbeStatus = "error"
    for kind, word in _STATUS:
        if isinstance(error, kind):
            status = word
    return Reading(status, error.upstream_status, _words(error)[:MAX_DETAIL])


def _words(error: errors.ProviderError) -> str:
    return f"{error.text} {error.detail}".strip()


def probe_now(provider: Provider) -> Reading:
    """Probe a provider and take note of it; sync, for a person who waits. Never inside `changes()`, for it dials."""
    keyring.load_if_changed()
    now = timezone.now()
    reading = async_to_sync(probe_endpoint)(
        provider.endpoint(), probe_credential(provider), timeout=settings.HEALTH_CHECK_TIMEOUT_SECONDS
    )
    record(provider.pk, reading, now=now)
    return reading


def probe_credential(provider: Provider) -> Credential | None:
    """The key that probes are asked with: the default one, else the first that is enabled."""
    key = ApiKey.objects.filter(provider=provider, enabled=True).order_by("-is_default", "pk").first()
    return None if key is None else key.credential()


# -- the state machine -------------------------------------------------------------------------------------------------


def record(provider_id: int, reading: Reading, *, now: datetime) -> ProviderHealth | None:
    """Take note of what a probe saw that was begun at `now`: present state, history, and when to ask again.

    Returns the new state, or None when a newer probe was faster, or the provider is gone.
    """
    for _ in range(_PATIENCE):
        health = _row(provider_id)
        if health is None or _is_newer(health, now):
            return None
        before = health.health_status
        changes = _after_probe(health, reading, now)
        with transaction.atomic():
            if not _swap(health, changes):
                continue
            HealthCheck.objects.create(
                provider_id=provider_id,
                at=now,
                status=reading.status,
                status_code=reading.status_code,
                latency_ms=reading.latency_ms,
                detail=reading.detail[:MAX_DETAIL],
            )
        _tell(health, before)
        return health
    logger.warning(
        "health of provider %s was changed by others all the time; this probe is dropped", provider_id
    )
    return None


def set_override(provider: Provider, is_healthy: bool | None) -> ProviderHealth:
    """A person's word on the provider, whatever its probes see; None lifts it. A word resets the count of failures.

    What was overridden is probed at once when the override is lifted. Inside `audit.changes` the word is recorded.
    """
    while True:
        health = _row(provider.pk) or _made(provider.pk)
        before, old = health.health_status, health.override
        changes: dict[str, Any] = {"override": is_healthy}
        if is_healthy is None:
            changes["next_probe_at"] = timezone.now()
        else:
            changes["consecutive_failures"] = 0
        if _swap(health, changes):
            if old is not is_healthy:
                _record_override(provider, old, is_healthy)
            _tell(health, before)
            return health


def _record_override(provider: Provider, old: bool | None, new: bool | None) -> None:
    with contextlib.suppress(NotInChanges):
        audit_record(provider, verb="override", before={"is_healthy": old}, after={"is_healthy": new})


def ensure_rows() -> None:
    """Give every provider its row of health; it is due at once."""
    missing = Provider.objects.filter(health=None).values_list("pk", flat=True)
    rows = [ProviderHealth(provider_id=pk, next_probe_at=LONG_AGO) for pk in missing]
    ProviderHealth.objects.bulk_create(rows, ignore_conflicts=True)


def _is_newer(health: ProviderHealth, now: datetime) -> bool:
    """Whether a probe that began after `now` was noted already; one from the future was begun before the clock was set back."""
    return health.last_checked_at is not None and now <= health.last_checked_at <= timezone.now() + AHEAD


def _row(provider_id: int) -> ProviderHealth | None:
    found = ProviderHealth.objects.select_related("provider").filter(pk=provider_id).first()
    if found is None and Provider.objects.filter(pk=provider_id).exists():
        return _made(provider_id)
    return found


def _made(provider_id: int) -> ProviderHealth:
    row = ProviderHealth(provider_id=provider_id, next_probe_at=LONG_AGO)
    ProviderHealth.objects.bulk_create([row], ignore_conflicts=True)
    return ProviderHealth.objects.select_related("provider").get(pk=provider_id)


def _after_probe(health: ProviderHealth, reading: Reading, now: datetime) -> dict[str, Any]:
    online = reading.status == "online"
    changes: dict[str, Any] = {
        "status": reading.status,
        "status_code": reading.status_code,
        "latency_ms": reading.latency_ms,
        "detail": reading.detail[:MAX_DETAIL],
        "consecutive_failures": 0 if online else health.consecutive_failures + 1,
        "last_checked_at": now,
    }
    # Somebody saw the provider fail after this probe had begun, and asked for another: that wish stays.
    if not now < health.next_probe_at <= timezone.now():
        changes["next_probe_at"] = now + _until_next(health.provider, online=online)
    return changes


def _until_next(provider: Provider, *, online: bool) -> timedelta:
    """The provider's interval with jitter; a failing one is never asked late, so that the time to `down` has a bound."""
    # A row may have been written past the forms. In this order what is no number is a day as well.
    interval = min(MOST_SECONDS, provider.probe_interval_seconds or settings.HEALTH_CHECK_INTERVAL_SECONDS)
    if not online:
        interval = min(interval, RECOVERY_SECONDS)
    spread = random.uniform(1 - JITTER, 1 + JITTER if online else 1.0)  # noqa: S311 - spreads load, guards nothing
    return timedelta(seconds=interval * spread)


def _verdict(health: ProviderHealth) -> Verdict:
    if health.override is not None:
        return Verdict.HEALTHY if health.override else Verdict.DOWN
    if health.status == Status.ONLINE:
        return Verdict.HEALTHY
    if health.consecutive_failures >= settings.HEALTH_CHECK_FAILURE_THRESHOLD:
        return Verdict.DOWN
    return Verdict.UNKNOWN if health.last_checked_at is None else Verdict.DEGRADED


_WITNESSES = ("last_checked_at", "override", "consecutive_failures", "next_probe_at")


def _swap(health: ProviderHealth, changes: dict[str, Any]) -> bool:
    """Write `changes` and what follows from them, unless the row is no longer the one that was read."""
    seen = {name: getattr(health, name) for name in _WITNESSES}
    unchanged = {
        f"{name}__isnull" if old is None else name: True if old is None else old for name, old in seen.items()
    }
    for name, value in changes.items():
        setattr(health, name, value)
    verdict = _verdict(health)
    changes = {**changes, "health_status": verdict, "is_healthy": verdict != Verdict.DOWN}
    if verdict != health.health_status:
        changes["changed_at"] = timezone.now()
    for name, value in changes.items():
        setattr(health, name, value)
    return ProviderHealth.objects.filter(pk=health.pk, **unchanged).update(**changes) == 1


def _tell(health: ProviderHealth, before: str) -> None:
    """One line for each change of the verdict, none for probes that found what was known."""
    if health.health_status == before:
        return
    level = logging.INFO if health.health_status == Verdict.HEALTHY else logging.WARNING
    logger.log(
        level,
        "provider %s was %s and is %s: %s",
        health.provider.slug,
        Verdict(before).value,
        Verdict(health.health_status).value,
        "set by hand" if health.override is not None else health.detail or health.status,
        extra={"provider": health.provider.slug},
    )
