"""Where a request goes: the ordered candidates, and why each was taken or left (contract, section 2.1)."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from providers.wire import Credential
from proxy.auth import Caller
from proxy.errors import CredentialMissing, ModelNotAllowed, ModelNotFound, NoProviderAvailable
from proxy.snapshot import Choice, Snapshot, Upstream
from proxy.weather import Weather


@dataclass(frozen=True, slots=True)
class Candidate:
    """One upstream, the model to ask it for, and the key to ask with."""

    upstream: Upstream
    model: str
    credential: Credential | None = None

    @property
    def full_name(self) -> str:
        return f"{self.upstream.slug}/{self.model}"


@dataclass(frozen=True, slots=True)
class Plan:
    """route: which rule decided (`x-penstock-route`). trace: a line for each upstream that was thought of."""

    route: str
    requested: str
    candidates: tuple[Candidate, ...]
    trace: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conditions:
    """What may not be dialled now, apart from configuration."""

    weather: Weather
    open_circuits: Collection[int] = frozenset()


def plan(
    snapshot: Snapshot, conditions: Conditions, caller: Caller, *, purpose: str, model: str, provider_id: str
) -> Plan:
    """The candidates in order. Raises ModelNotFound, ModelNotAllowed, NoProviderAvailable or CredentialMissing."""
    route, choices = resolve(snapshot, purpose=purpose, model=model, provider_id=provider_id)
    named = [
        (snapshot.upstreams[choice.provider_id], choice)
        for choice in choices
        if choice.provider_id in snapshot.upstreams
    ]
    if not named:
        raise NoProviderAvailable("The provider for this is disabled.")
    _check_scope(caller, model, named[0][0].slug, named[0][1].model)
    able = [
        (upstream, choice) for upstream, choice in named if upstream.kind.chat is not None and choice.model
    ]
    candidates, trace = _weathered(able, conditions)
    if not candidates:
        raise (
            CredentialMissing()
            if trace and all("no usable key" in line for line in trace)
            else NoProviderAvailable()
        )
    return Plan(route, model, tuple(candidates), tuple(trace))


def resolve(
    snapshot: Snapshot, *, purpose: str, model: str, provider_id: str
) -> tuple[str, Sequence[Choice]]:
    """The rules of the contract, first match wins: (the rule's name, choices with their upstream models)."""
    if provider_id:
        found = _by_id(snapshot, provider_id)
        if found is None:
            raise ModelNotFound("No enabled provider has this provider_id.", param="provider_id")
        return "provider_id", [Choice(found.id, model or first_model(snapshot, found, purpose))]
    slug, slash, rest = model.partition("/")
    if slash and rest and slug in snapshot.by_slug:
        return f"provider:{slug}", [Choice(snapshot.by_slug[slug], rest)]
    if model:
        ids = [
            each for each in snapshot.catalogue.get(model, ()) if purpose in snapshot.upstreams[each].purposes
        ]
        if not ids:
            raise ModelNotFound(f"No provider has the model {model[:128]}.", param="model")
        return "catalogue", [Choice(each, model) for each in ids]
    chosen = snapshot.active.get(purpose, ())
    if not chosen:
        raise ModelNotFound(
            f"No provider is active for {purpose}; name a model, or make one active.", param="model"
        )
    return f"active:{purpose}", [_with_model(snapshot, choice, purpose) for choice in chosen]


def first_model(snapshot: Snapshot, upstream: Upstream, purpose: str) -> str:
    """The upstream's first model that is for `purpose`, or may be; nothing when it has none."""
    for name in upstream.models:
        purposes = snapshot.model_purposes.get((upstream.id, name), frozenset())
        if not purposes or purpose in purposes:
            return name
    return ""


def _with_model(snapshot: Snapshot, choice: Choice, purpose: str) -> Choice:
    if choice.model or choice.provider_id not in snapshot.upstreams:
        return choice
    upstream = snapshot.upstreams[choice.provider_id]
    return Choice(choice.provider_id, first_model(snapshot, upstream, purpose), choice.credential)


def _by_id(snapshot: Snapshot, provider_id: str) -> Upstream | None:
    if provider_id.isascii() and provider_id.isdigit() and len(provider_id) < 19:
        return snapshot.upstreams.get(int(provider_id))
    return snapshot.upstreams.get(snapshot.by_slug.get(provider_id, -1))


def _check_scope(caller: Caller, asked: str, slug: str, model: str) -> None:
    """Names are those asked for, or `<slug>/<model>` of the first choice; its fallbacks are allowed with it."""
    names = [name for name in (asked, f"{slug}/{model}") if name]
    if not allows(caller, *names):
        raise ModelNotAllowed(param="model")


def allows(caller: Caller, *names: str) -> bool:
    """Whether the caller may use a model that goes by any of these names."""
    return not caller.allowed_models or any(
        fnmatchcase(name, pattern) for pattern in caller.allowed_models for name in names
    )


def _weathered(
    named: Sequence[tuple[Upstream, Choice]], conditions: Conditions
) -> tuple[list[Candidate], list[str]]:
    """Leave out what is down; when nothing is left, the first that only its probes call down gets a forced trial."""
    candidates, trials, trace = [], [], []
    for upstream, choice in named:
        try:
            credential = _credential(upstream, choice, conditions.weather.rejected)
        except LookupError:
            trace.append(f"{upstream.slug}: no usable key")
            continue
        candidate = Candidate(upstream, choice.model, credential)
        if upstream.id in conditions.open_circuits:
            trace.append(f"{upstream.slug}: circuit open")
        elif upstream.id in conditions.weather.down:
            trace.append(f"{upstream.slug}: down ({conditions.weather.down[upstream.id][:80]})")
            if upstream.id not in conditions.weather.overridden:
                trials.append(candidate)
        else:
            candidates.append(candidate)
    if not candidates and trials:
        trace.append(f"{trials[0].upstream.slug}: forced trial")
        return trials[:1], trace
    return candidates, trace


def _credential(upstream: Upstream, choice: Choice, rejected: Collection[int]) -> Credential | None:
    """The key to dial with: the chosen one, else one by weight among those not refused. LookupError when a vendor has none."""
    if choice.credential is not None:
        return choice.credential
    usable = [each for each in upstream.credentials if each.key_id not in rejected]
    if not usable:
        # Every key was refused: trying one again is how a key that was mended at the vendor comes back.
        usable = list(upstream.credentials)
    if not usable:
        if upstream.kind.needs_key:
            raise LookupError
        return None
    if len(usable) == 1:
        return usable[0]
    return random.choices(usable, weights=[each.weight for each in usable])[0]  # noqa: S311  # shares load, guards nothing


def visible_models(snapshot: Snapshot, caller: Caller) -> Iterator[tuple[str, str]]:
    """(id, provider slug) of what this key may call: bare names first, then `<slug>/<model>`."""
    for name, ids in snapshot.catalogue.items():
        slug = snapshot.upstreams[ids[0]].slug
        if allows(caller, name, f"{slug}/{name}"):
            yield name, slug
    for upstream in snapshot.upstreams.values():
        for name in upstream.models:
            if allows(caller, f"{upstream.slug}/{name}"):
                yield f"{upstream.slug}/{name}", upstream.slug
