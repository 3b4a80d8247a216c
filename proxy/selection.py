"""Where a request goes: the ordered candidates, and why each was taken or left (contract, section 2.1)."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import islice
from typing import NamedTuple

from proxy.auth import Caller
from proxy.candidates import Candidate, Conditions, Named, Sorted, sort_out
from proxy.errors import (
    ContextTooLong,
    CredentialMissing,
    GatewayError,
    InvalidRequest,
    ModelNotAllowed,
    ModelNotFound,
    NoProviderAvailable,
    UpstreamsLimited,
)
from proxy.needs import NAMES, NOTHING, UNKNOWN, Misfit, Needs, misfit, same_dimensions
from proxy.snapshot import Choice, Snapshot, Upstream
from proxy.strategies import (
    ROUTES,
    Node,
    Option,
    PriceToCompare,
    Ranked,
    Route,
    RouteState,
    matches,
    unknown_price,
)
from proxy.weather import Weather

MOST_MODELS = 20
"""Among how many models of its provider one is sought that fits, for a node that names none."""

FEW_MODELS = 2
"""How many of those are tried; a request is dialled three times at most."""

MOST_STANDINGS = 2000
"""How many names are remembered: callers may make up models of a provider."""

OURS = "penstock"
"""Who owns the models that are routes."""


class Plan(NamedTuple):
    """route: which rule decided (`x-penstock-route`). trace: a line for each upstream that was thought of.

    resume: whether configuration lets the next candidate take up a stream that broke.
    """

    route: str
    requested: str
    candidates: tuple[Candidate, ...]
    trace: tuple[str, ...]
    resume: bool = False


class Resolved(NamedTuple):
    """What a model name means: the rule that decided, and its choices in order; those of a route are put in order later."""

    rule: str
    choices: Sequence[Choice]
    route: Route | None = None
    hint: str = ""

    @property
    def resume(self) -> bool:
        if self.route is not None:
            return self.route.resume is not False
        return self.rule.startswith("active:") and len(self.choices) > 1


class Standing(NamedTuple):
    """What a name means to a caller while configuration stays the same: the rule, and who can do it at all.

    providers: their ids. described: whether something is known of their models that a request could ask too much of.
    calm: where conditions alone decide, the plan for when there is nothing against any of them.
    """

    resolved: Resolved
    able: Sequence[Named]
    providers: frozenset[int]
    described: bool
    calm: Plan | None


def plan(
    snapshot: Snapshot,
    conditions: Conditions,
    caller: Caller,
    *,
    purpose: str,
    model: str,
    provider_id: str,
    needs: Callable[[], Needs] = lambda: NOTHING,
    routes: RouteState = ROUTES,
) -> Plan:
    """The candidates in order. Raises ModelNotFound, ModelNotAllowed, NoProviderAvailable or CredentialMissing, and
    ContextTooLong or InvalidRequest when no candidate could take what the request needs."""
    standing = _standing(snapshot, caller, purpose=purpose, model=model, provider_id=provider_id)
    able: Sequence[Named] = standing.able
    left_out: Sequence[str] = ()
    if standing.described:
        able, left_out = fitting(snapshot, able, purpose=purpose, needs=needs())
    if standing.calm is not None and not left_out and conditions.nothing_against(standing.providers):
        return _priced(snapshot, standing.calm)
    resolved = standing.resolved
    if resolved.route is not None:
        order = ranked(
            routes, resolved.route, able, conditions, hint=resolved.hint, price=snapshot.price_to_compare
        )
        able = [each for each, _ in order]
    found = sort_out(able, conditions, turn=routes.turn_of_key, window=functools.partial(_window, snapshot))
    if not found.candidates:
        raise _nobody(found)
    return _planned(snapshot, resolved, model, found, left_out)


def _planned(
    snapshot: Snapshot, resolved: Resolved, model: str, found: Sorted, left_out: Sequence[str] = ()
) -> Plan:
    trace = (*left_out, *found.trace)
    return _priced(snapshot, Plan(resolved.rule, model, tuple(found.candidates), trace, resolved.resume))


def _priced(snapshot: Snapshot, plan: Plan) -> Plan:
    """The plan at the prices of this moment: some have a date or an hour from which they hold."""
    prices = [snapshot.price(each.upstream.id, each.model) for each in plan.candidates]
    if all(price is each.price for price, each in zip(prices, plan.candidates, strict=True)):
        return plan
    priced = zip(prices, plan.candidates, strict=True)
    return plan._replace(candidates=tuple(each._replace(price=price) for price, each in priced))


def _standing(snapshot: Snapshot, caller: Caller, *, purpose: str, model: str, provider_id: str) -> Standing:
    """Worked out once for each name that is asked for, until the configuration changes."""
    key = (purpose, model, provider_id, caller.allowed_models)
    known: Standing | None = snapshot.standings.get(key)
    if known is None:
        if len(snapshot.standings) >= MOST_STANDINGS:
            snapshot.standings.clear()
        known = snapshot.standings[key] = _worked_out(
            snapshot, caller, purpose=purpose, model=model, provider_id=provider_id
        )
    return known


def _worked_out(
    snapshot: Snapshot, caller: Caller, *, purpose: str, model: str, provider_id: str
) -> Standing:
    resolved = resolve(snapshot, purpose=purpose, model=model, provider_id=provider_id)
    named = [
        (snapshot.upstreams[choice.provider_id], choice)
        for choice in resolved.choices
        if choice.provider_id in snapshot.upstreams
    ]
    if not named:
        raise NoProviderAvailable(
            "The provider for this is disabled."
            if resolved.route is None
            else f"No enabled provider of this route has a model for {purpose}."
        )
    _check_scope(caller, model, resolved, named)
    able = [
        (upstream, choice) for upstream, choice in named if upstream.kind.chat is not None and choice.model
    ]
    # Vectors have to be of one length even where nothing is known of it.
    described = purpose == "embeddings" or any(
        snapshot.facts_of(upstream.id, choice.model) is not UNKNOWN for upstream, choice in able
    )
    calm = None
    if resolved.route is None and all(len(upstream.credentials) < 2 for upstream, _ in able):
        found = sort_out(able, Conditions(Weather()), window=functools.partial(_window, snapshot))
        if found.candidates:
            calm = _planned(snapshot, resolved, model, found)
    return Standing(resolved, able, frozenset(upstream.id for upstream, _ in able), described, calm)


def _nobody(found: Sorted) -> GatewayError:
    if found.waits:
        return UpstreamsLimited(retry_after=min(found.waits))
    return CredentialMissing() if found.keyless else NoProviderAvailable()


def _window(snapshot: Snapshot, named: Named) -> int | None:
    upstream, choice = named
    return snapshot.facts_of(upstream.id, choice.model).context_window


def resolve(snapshot: Snapshot, *, purpose: str, model: str, provider_id: str) -> Resolved:
    """The rules of the contract, first match wins."""
    if provider_id:
        found = _by_id(snapshot, provider_id)
        if found is None:
            raise ModelNotFound("No enabled provider has this provider_id.", param="provider_id")
        choice = Choice(found.id, model or first_model(snapshot, found, purpose))
        return Resolved("provider_id", [choice])
    slug, slash, rest = model.partition("/")
    route = snapshot.routes.get(slug)
    if route is not None and (not slash or route.mode == "specific"):
        return _by_route(snapshot, route, hint=rest, purpose=purpose)
    if slash and rest and slug in snapshot.by_slug:
        return Resolved(f"provider:{slug}", [Choice(snapshot.by_slug[slug], rest)])
    if model:
        ids = [
            each for each in snapshot.catalogue.get(model, ()) if purpose in snapshot.upstreams[each].purposes
        ]
        if not ids:
            raise ModelNotFound(f"No provider has the model {model[:128]}.", param="model")
        return Resolved("catalogue", [Choice(each, model) for each in ids])
    chosen = snapshot.active.get(purpose, ())
    if not chosen:
        raise ModelNotFound(
            f"No provider is active for {purpose}; name a model, or make one active.", param="model"
        )
    return Resolved(f"active:{purpose}", [_with_model(snapshot, choice, purpose) for choice in chosen])


def _by_route(snapshot: Snapshot, route: Route, *, hint: str, purpose: str) -> Resolved:
    choices = route_choices(snapshot, route, hint=hint, purpose=purpose)
    return Resolved(f"route:{route.name}", choices, route, hint)


def route_choices(snapshot: Snapshot, route: Route, *, purpose: str, hint: str = "") -> list[Choice]:
    """Models of each node whose provider is enabled, as the route lists them. ModelNotFound when none is meant by `hint`."""
    choices = [
        Choice(node.provider_id, model, node=node)
        for node in route.nodes
        if (upstream := snapshot.upstreams.get(node.provider_id)) is not None
        for model in _models_of(snapshot, node, upstream, purpose, hint)
    ]
    if hint and not any(matches(choice.model, hint) for choice in choices):
        raise ModelNotFound(f"The route {route.name} has no model {hint[:128]}.", param="model")
    return choices


def _models_of(snapshot: Snapshot, node: Node, upstream: Upstream, purpose: str, hint: str) -> Iterator[str]:
    """What a node names, as far as it is for `purpose`; else models of its provider that may be, those of the hint first."""
    if node.models:
        for name in node.models:
            purposes = snapshot.facts_of(upstream.id, name).purposes
            if purpose in (purposes or upstream.purposes):
                yield name
    elif purpose in upstream.purposes:
        hinted = (
            [name for name in _models_for(snapshot, upstream, purpose) if matches(name, hint)] if hint else []
        )
        yield from hinted
        first = islice(_models_for(snapshot, upstream, purpose), MOST_MODELS)
        yield from (name for name in first if name not in hinted)


def fitting(
    snapshot: Snapshot, named: Sequence[Named], *, purpose: str, needs: Needs
) -> tuple[list[Named], list[str]]:
    """Those that may take the request, and a line for each of the others. Raises ContextTooLong when only windows are
    too small, and InvalidRequest when every model lacks something."""
    able: list[Named] = []
    trace, misfits = [], []
    for upstream, choice in named:
        facts = snapshot.facts_of(upstream.id, choice.model)
        if (found := misfit(facts, needs)) is not None:
            misfits.append(found)
            trace.append(f"{upstream.slug}/{choice.model}: cannot: {found.text}")
        elif purpose == "embeddings" and able and not _embeds_alike(snapshot, able[0], (upstream, choice)):
            trace.append(f"{upstream.slug}/{choice.model}: makes vectors of another length")
        else:
            able.append((upstream, choice))
    if misfits and not able:
        raise _unfit(misfits)
    return able, trace


def _unfit(misfits: Sequence[Misfit]) -> InvalidRequest:
    lacking = sorted({NAMES[each.what] for each in misfits if each.what != "window"})
    if not lacking:
        return ContextTooLong(param="messages")
    return InvalidRequest(f"No model that could answer takes all of this: {', '.join(lacking)}.")


def _embeds_alike(snapshot: Snapshot, first: Named, other: Named) -> bool:
    (one, choice), (two, alternative) = first, other
    return same_dimensions(
        choice.model,
        snapshot.facts_of(one.id, choice.model),
        alternative.model,
        snapshot.facts_of(two.id, alternative.model),
    )


def ranked(
    routes: RouteState,
    route: Route,
    named: Sequence[Named],
    conditions: Conditions,
    *,
    hint: str = "",
    peek: bool = False,
    price: PriceToCompare = unknown_price,
) -> list[tuple[Named, Ranked]]:
    """The order that the route's strategy gives its choices; `peek` leaves everybody's turn as it is.

    Who is down or has an open circuit takes no turn, so that the others share his load; whether he is dialled after all
    is decided where that is decided for everybody.
    """
    few = list(_few(named))
    options = [Option(choice.node, choice.model) for _, choice in few if choice.node is not None]
    avoid = frozenset((*conditions.weather.down, *conditions.open_circuits))
    return [
        (few[each.index], each)
        for each in routes.order(route, options, hint=hint, avoid=avoid, peek=peek, price=price)
    ]


def _few(named: Sequence[Named]) -> Iterator[Named]:
    """Of nodes that name no models only the first ones."""
    seen: Counter[int] = Counter()
    for upstream, choice in named:
        node = choice.node
        if node is not None and not node.models:
            seen[node.id] += 1
            if seen[node.id] > FEW_MODELS:
                continue
        yield upstream, choice


def obstacle(named: Named, conditions: Conditions) -> str:
    """What keeps this choice from being dialled now, in words; nothing when it would be."""
    line = sort_out([named], conditions, window=lambda each: None).trace[0].partition(": ")[2]
    return "" if line == "taken" else line


def first_model(snapshot: Snapshot, upstream: Upstream, purpose: str) -> str:
    """The upstream's first model that is for `purpose`, or may be; nothing when it has none."""
    return next(_models_for(snapshot, upstream, purpose), "")


def _models_for(snapshot: Snapshot, upstream: Upstream, purpose: str) -> Iterator[str]:
    for name in upstream.models:
        purposes = snapshot.facts_of(upstream.id, name).purposes
        if not purposes or purpose in purposes:
            yield name


def _with_model(snapshot: Snapshot, choice: Choice, purpose: str) -> Choice:
    if choice.model or choice.provider_id not in snapshot.upstreams:
        return choice
    upstream = snapshot.upstreams[choice.provider_id]
    return Choice(choice.provider_id, first_model(snapshot, upstream, purpose), choice.credential)


def _by_id(snapshot: Snapshot, provider_id: str) -> Upstream | None:
    if provider_id.isascii() and provider_id.isdigit() and len(provider_id) < 19:
        return snapshot.upstreams.get(int(provider_id))
    return snapshot.upstreams.get(snapshot.by_slug.get(provider_id, -1))


def _check_scope(caller: Caller, asked: str, resolved: Resolved, named: Sequence[Named]) -> None:
    """Names are those asked for, or `<slug>/<model>` of the first choice; its fallbacks are allowed with it.

    A route has no first choice, since its nodes take turns: its name allows all of them, and so does naming each.
    """
    full_names = [f"{upstream.slug}/{choice.model}" for upstream, choice in named]
    if resolved.route is None:
        allowed = allows(caller, *filter(None, (asked, full_names[0])))
    else:
        allowed = allows(caller, asked, resolved.route.name) or all(
            allows(caller, each) for each in full_names
        )
    if not allowed:
        raise ModelNotAllowed(param="model")


def allows(caller: Caller, *names: str) -> bool:
    """Whether the caller may use a model that goes by any of these names."""
    return not caller.allowed_models or any(
        fnmatchcase(name, pattern) for pattern in caller.allowed_models for name in names
    )


def visible_models(snapshot: Snapshot, caller: Caller) -> Iterator[tuple[str, str]]:
    """(id, owner) of what this key may call: routes first, which are ours; then bare names, then `<slug>/<model>`."""
    for name in snapshot.routes:
        if allows(caller, name):
            yield name, OURS
    for name, ids in snapshot.catalogue.items():
        slug = snapshot.upstreams[ids[0]].slug
        if name not in snapshot.routes and allows(caller, name, f"{slug}/{name}"):
            yield name, slug
    for upstream in snapshot.upstreams.values():
        for name in upstream.models:
            if allows(caller, f"{upstream.slug}/{name}"):
                yield f"{upstream.slug}/{name}", upstream.slug
