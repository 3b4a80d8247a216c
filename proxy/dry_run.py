"""What a route would do now, and why: asked by people, on the same rules and the same state that requests meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from audit.models import Head
from providers.models import Purpose
from proxy import snapshot as snapshots
from proxy import weather as weathers
from proxy.candidates import NO_KEY, Conditions, Named
from proxy.models import ModelRoute
from proxy.needs import NOTHING
from proxy.selection import fitting, obstacle, ranked, route_choices
from proxy.snapshot import Snapshot, route_of
from proxy.strategies import ROUTES, Node, Route, why


@dataclass(frozen=True, slots=True)
class Step:
    """One model of one node. place: 1 is tried first. obstacle: why it would not be dialled now, or nothing."""

    place: int
    provider_id: int
    provider_name: str
    slug: str
    model: str
    reason: str
    obstacle: str = ""
    circuit_open: bool = False

    @property
    def has_key(self) -> bool:
        return self.obstacle != NO_KEY


@dataclass(frozen=True, slots=True)
class DryRun:
    """The steps in order, and lines about nodes that are not among them."""

    purpose: str
    steps: tuple[Step, ...]
    notes: tuple[str, ...]

    @property
    def chosen(self) -> Step | None:
        """Where a request would go first."""
        return next((step for step in self.steps if not step.obstacle), None)


def run(row: ModelRoute, *, hint: str = "", peek: bool = True) -> DryRun:
    """What a request to this route, active or not, would meet. `peek`: nobody's turn is used up.

    hint: as after the slash in `<route>/<hint>`; it counts in mode specific only. Raises ModelNotFound when nothing
    matches it.
    """
    snapshot, conditions = present()
    route = route_of(row)
    purpose = _purpose(snapshot, route)
    hint = hint if route.mode == "specific" else ""
    choices = route_choices(snapshot, route, hint=hint, purpose=purpose)
    named = [(snapshot.upstreams[choice.provider_id], choice) for choice in choices]
    able, left_out = fitting(snapshot, named, purpose=purpose, needs=NOTHING)
    order = ranked(ROUTES, route, able, conditions, hint=hint, peek=peek, price=snapshot.price_to_compare)
    steps = [_step(place, each, why(rank), conditions) for place, (each, rank) in enumerate(order, start=1)]
    shown = {choice.node for _, choice in named}
    absent = [_absent(row, snapshot, node, purpose) for node in route.nodes if node not in shown]
    return DryRun(purpose, tuple(steps), (*left_out, *absent))


def state(row: ModelRoute) -> dict[str, Any]:
    """What this process remembers of the route."""
    return ROUTES.describe(route_of(row))


def present() -> tuple[Snapshot, Conditions]:
    """The configuration and the conditions of this moment.

    They are this process' own where it serves requests and has seen the last change, else read from the database.
    """
    # Only a process that is asked about routes needs to load the data plane.
    from proxy.gateway import GATEWAY

    watcher = GATEWAY.watcher
    current = bool(watcher.answered_at) and watcher.snapshot.version == _version()
    snapshot = watcher.snapshot if current else snapshots.build()
    return snapshot, GATEWAY.conditions()._replace(weather=weathers.read())


def _version() -> int:
    return int(Head.objects.values_list("seq", flat=True).get(pk=1))


def _purpose(snapshot: Snapshot, route: Route) -> str:
    """What the route is for: the first purpose that any of its nodes has a model for."""
    found = (each for each in Purpose.values if route_choices(snapshot, route, purpose=each))
    return next(found, Purpose.CHAT.value)


def _step(place: int, named: Named, reason: str, conditions: Conditions) -> Step:
    upstream, choice = named
    return Step(
        place,
        upstream.id,
        upstream.endpoint.name,
        upstream.slug,
        choice.model,
        reason,
        obstacle(named, conditions),
        upstream.id in conditions.open_circuits,
    )


def _absent(row: ModelRoute, snapshot: Snapshot, node: Node, purpose: str) -> str:
    provider = next(each.provider for each in row.nodes.all() if each.pk == node.id)
    if node.provider_id in snapshot.upstreams:
        return f"{provider.slug}: no model for {purpose} is known"
    return f"{provider.slug}: the provider is disabled"
