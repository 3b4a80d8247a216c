"""What providers can serve: asking them, and keeping what they said."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.core.cache import cache
from django.utils import timezone

from audit.changes import Via, changes, record
from providers import adapters, errors, keyring, upstream
from providers.models import ApiKey, Provider, ProviderHealth, UpstreamModel
from providers.wire import Answer, Credential, Endpoint, Kind, Model, WireRequest

MAX_MODELS = 2000
MAX_NAME = 255
MAX_NUMBER = 2**31 - 1
FRESH_SECONDS = 300
RETRY_SECONDS = 60
FACTS = ("purposes", "context_window", "dimensions", "capabilities")


@dataclass(frozen=True, slots=True)
class RefreshResult:
    """What a refresh found (`models`, as the provider told them) and what it changed, as names."""

    models: tuple[Model, ...] = ()
    added: tuple[str, ...] = ()
    updated: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return bool(self.added or self.updated or self.removed)


async def discover(
    endpoint: Endpoint,
    credential: Credential | None,
    *,
    timeout: float,  # noqa: ASYNC109 - as for upstream.ask
) -> tuple[Model, ...]:
    """The models that the provider lists, at most 2,000, in order of their names. Raises from `providers.errors`."""
    kind = adapters.kind(endpoint.kind)
    if kind.models is None:
        raise errors.ProviderError(detail="this kind of provider does not list its models")
    request = built(kind.models.request, endpoint)
    answer = await upstream.ask(endpoint, request, credential=credential, timeout=timeout)
    return _read(kind, answer)


def built(request: Callable[[Endpoint], WireRequest], endpoint: Endpoint) -> WireRequest:
    """An adapter's request. A row that was written past the forms may hold no address: DestinationNotAllowed."""
    try:
        return request(endpoint)
    except ValueError as error:
        raise errors.DestinationNotAllowed(detail="the base URL is no address") from error


def listed_in(endpoint: Endpoint, answer: Answer | None) -> tuple[Model, ...]:
    """The models in the answer to a probe, where a kind's probe is the listing itself; else nothing."""
    kind = adapters.kind(endpoint.kind)
    if answer is None or kind.models is None or kind.probe is None:
        return ()
    same = kind.models.request(endpoint).url == kind.probe.request(endpoint).url
    return _read(kind, answer) if same else ()


def _read(kind: Kind, answer: Answer) -> tuple[Model, ...]:
    if kind.models is None:
        return ()
    if not 200 <= answer.status < 300:
        raise kind.classify(answer.status, answer.headers, answer.body)
    found = {model.id: model for model in kind.models.parse(answer.body) if _is_name(model.id)}
    return tuple(found[name] for name in sorted(found)[:MAX_MODELS])


def _is_name(name: str) -> bool:
    return 0 < len(name) <= MAX_NAME and name.isprintable() and name == name.strip()


class UnknownSlug(Exception):
    """There is no provider with one of the slugs that were asked for."""


def by_slug(slugs: Sequence[str]) -> list[Provider]:
    """The providers with these slugs, in their order; all that are enabled when none is given. Raises UnknownSlug."""
    if not slugs:
        return list(Provider.objects.filter(enabled=True))
    found = {provider.slug: provider for provider in Provider.objects.filter(slug__in=slugs)}
    if unknown := [slug for slug in slugs if slug not in found]:
        raise UnknownSlug(f"there is no provider {', '.join(unknown)}")
    return [found[slug] for slug in slugs]


@dataclass(frozen=True, slots=True)
class Listing:
    """What a provider listed, and when."""

    at: datetime
    models: tuple[Model, ...]


def look(provider: Provider) -> Listing:
    """Ask the provider for its models, and remember the answer for five minutes. Sync; never call it inside `changes()`.

    Raises from `providers.errors`; then nobody asks again for a minute, since whoever does may wait long.
    """
    keyring.load_if_changed()
    key = ApiKey.objects.filter(provider=provider, enabled=True).order_by("-is_default", "pk").first()
    try:
        found = async_to_sync(discover)(
            provider.endpoint(), key.credential() if key else None, timeout=settings.TEST_TIMEOUT_SECONDS
        )
    except errors.ProviderError:
        if UpstreamModel.objects.filter(provider=provider, enabled=True).exists():
            cache.set(_memory(provider), Listing(timezone.now(), ()), RETRY_SECONDS)
        raise
    listing = Listing(timezone.now(), found)
    cache.set(_memory(provider), listing, FRESH_SECONDS)
    return listing


def recall(provider: Provider) -> Listing | None:
    """What the provider listed within the last five minutes, as far as this process knows."""
    listing: Listing | None = cache.get(_memory(provider))
    return listing


def _memory(provider: Provider) -> str:
    """Another address or key may list other models."""
    return f"models-{provider.uid}-{provider.version}"


def unsaved(model: Model) -> UpstreamModel:
    """A model that was listed, as the row that it would be."""
    return UpstreamModel(name=model.id, source=UpstreamModel.Source.DISCOVERED, **_facts(model))


def refresh_models(
    provider: Provider,
    *,
    actor: AbstractBaseUser | AnonymousUser | None,
    via: Via,
    ip: str | None = None,
    request_id: str = "",
) -> RefreshResult:
    """Ask the provider for its models and keep the answer. Sync; never call it inside `changes()`, for it dials.

    Raises from `providers.errors` when the provider cannot be asked; then nothing is changed.
    """
    found = look(provider).models
    with changes(actor=actor, via=via, ip=ip, request_id=request_id):
        return save_models(provider, found)


def save_models(provider: Provider, models: Iterable[Model]) -> RefreshResult:
    """Make what the provider lists the discovered models of it. Inside `changes()`; one entry, none without a change.

    Rows that were written by hand are never touched. A discovered row that a person disabled stays, also while the provider
    does not list it, so that it does not come back enabled. A vendor that suddenly lists nothing is not believed.
    """
    listed = {model.id: model for model in models}
    if not listed and not provider.self_hosted:
        return RefreshResult()
    stored = {row.name: row for row in UpstreamModel.objects.filter(provider=provider)}
    added = _add(provider, [model for name, model in listed.items() if name not in stored])
    removed = _remove([row for name, row in stored.items() if name not in listed])
    before, after = _update([(stored[name], model) for name, model in listed.items() if name in stored])
    result = RefreshResult(tuple(listed.values()), added, tuple(after), removed)
    if result.changed:
        record(
            provider,
            verb="update",
            before={"models": list(result.removed), "models_known": before},
            after={"models": list(result.added), "models_known": after},
        )
    enabled = UpstreamModel.objects.filter(provider=provider, enabled=True).count()
    ProviderHealth.objects.filter(provider=provider).update(models_count=enabled)
    return result


def _add(provider: Provider, models: list[Model]) -> tuple[str, ...]:
    source = UpstreamModel.Source.DISCOVERED
    UpstreamModel.objects.bulk_create(
        [
            UpstreamModel(provider_id=provider.pk, name=model.id, source=source, **_facts(model))
            for model in models
        ],
        batch_size=200,
    )
    return tuple(model.id for model in models)


def _remove(rows: list[UpstreamModel]) -> tuple[str, ...]:
    gone = [row for row in rows if row.source == UpstreamModel.Source.DISCOVERED and row.enabled]
    for start in range(0, len(gone), 200):
        doomed = UpstreamModel.objects.filter(pk__in=[row.pk for row in gone[start : start + 200]])
        # `delete()` would tell of every row by a signal; this is one change, and nothing refers to these rows.
        doomed._raw_delete(doomed.db)
    return tuple(row.name for row in gone)


def _update(pairs: list[tuple[UpstreamModel, Model]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Write the facts that changed; what they were and what they are, by model."""
    before: dict[str, Any] = {}
    after: dict[str, Any] = {}
    rows = []
    for row, model in pairs:
        # What the provider does not tell is left as it is: a person may have filled it in.
        told = {name: value for name, value in _facts(model).items() if value}
        new = {name: value for name, value in told.items() if getattr(row, name) != value}
        if row.source != UpstreamModel.Source.DISCOVERED or not new:
            continue
        before[row.name] = {name: getattr(row, name) for name in new}
        after[row.name] = new
        for name, value in new.items():
            setattr(row, name, value)
        row.version += 1
        rows.append(row)
    UpstreamModel.objects.bulk_update(rows, (*FACTS, "version"), batch_size=200)
    return before, after


def _facts(model: Model) -> dict[str, Any]:
    return {
        "purposes": list(model.purposes),
        "context_window": _number(model.context_window),
        "dimensions": _number(model.dimensions),
        "capabilities": list(model.capabilities),
    }


def _number(value: int | None) -> int | None:
    return value if value is not None and 0 < value <= MAX_NUMBER else None
