"""In which order the nodes of a route are tried: arithmetic and a little memory, without Django.

The memory belongs to one process and begins at a random place, so that several processes need not agree to share well.
"""

from __future__ import annotations

import math
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

HALF_LIFE_SECONDS = 60.0
FORGOTTEN = 0.1
"""Below this weight what was measured is too old to mean anything: 200 s after a single answer."""

EXPLORE_EVERY = 10
"""With the strategy fastest, one request in so many goes to a node whose speed is not known."""

MOST_STEPS = 256
"""How far a rotation is turned before its first use."""

PriceToCompare = Callable[[int, str], float | None]
"""(provider id, model) to US dollars per million tokens; None where it is unknown."""


def unknown_price(provider_id: int, model: str) -> float | None:
    return None


@dataclass(frozen=True, slots=True)
class Node:
    """A place where a route may lead. `models` empty: those of the provider. `strategy` empty: the route's.

    price: what its operator wrote into `metadata["price"]`, US dollars per million tokens; it beats the price that is known.
    """

    id: int
    provider_id: int
    models: tuple[str, ...] = ()
    strategy: str = ""
    weight: int = 1
    priority: int = 0
    price: float | None = None


@dataclass(frozen=True, slots=True)
class Route:
    """A public model name and its nodes, in order. mode: auto, specific or multi. resume: None is the default."""

    id: int
    name: str
    mode: str = "auto"
    strategy: str = "round-robin"
    nodes: tuple[Node, ...] = ()
    resume: bool | None = None


class Option(NamedTuple):
    """One model of one node."""

    node: Node
    model: str


@dataclass(frozen=True, slots=True)
class Ranked:
    """An option's place in the order: its index among those that were given, and what decided."""

    index: int
    strategy: str
    measure: float


def matches(model: str, hint: str) -> bool:
    """Whether a hint means this model: its name, or the part of it after the last slash."""
    return hint in (model, model.rpartition("/")[2])


def why(ranked: Ranked) -> str:
    """What decided about an option's place, in words."""
    known = not math.isinf(ranked.measure)
    texts = {
        "round-robin": "by turns",
        "failover": f"in order, place {ranked.measure + 1:.0f}" if known else "in order",
        "weighted": "by weight" if ranked.measure == 0 else "weight 0, only as a fallback",
        "least-busy": f"{ranked.measure:.0f} requests in flight" if known else "",
        "fastest": f"{ranked.measure:.0f} ms to the first token" if known else "speed not known",
        "cheapest": f"${ranked.measure:g} for a million tokens" if known else "price not known",
    }
    if ranked.strategy == "fastest" and ranked.measure < 0:
        return "speed not known, tried to find out"
    return texts[ranked.strategy]


class Speeds:
    """Times to the first token, in milliseconds; what is older counts less, by half each minute."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[float, float, float]] = {}

    def observe(self, provider_id: int, model: str, ttft_ms: float, now: float) -> None:
        """now: seconds of any clock that only goes forward, the same for all calls."""
        total, weight, at = self._known.get((provider_id, model), (0.0, 0.0, now))
        kept = _decay(now - at)
        self._known[provider_id, model] = (total * kept + ttft_ms, weight * kept + 1.0, now)

    def of(self, provider_id: int, model: str, now: float) -> float | None:
        """The mean, or None when nothing is known, or not any more."""
        total, weight, at = self._known.get((provider_id, model), (0.0, 0.0, now))
        return total / weight if weight * _decay(now - at) > FORGOTTEN else None

    def known(self, now: float) -> dict[tuple[int, str], float]:
        """(provider id, model) to the mean, of all that are known."""
        means = ((key, self.of(*key, now)) for key in tuple(self._known))
        return {key: mean for key, mean in means if mean is not None}


def _decay(seconds: float) -> float:
    return float(0.5 ** (max(seconds, 0.0) / HALF_LIFE_SECONDS))


class Wheel:
    """Smooth weighted round-robin, as nginx does it: of weights 5, 1, 1 it makes a a b a c a a, not a a a a a b c.

    Source: https://github.com/nginx/nginx/commit/52327e0627f49dbda1e8db695e63a4b0af4448b1
    """

    def __init__(self, current: Mapping[int, int] | None = None) -> None:
        self.current: dict[int, int] = dict(current or {})

    def turn(self, weights: Mapping[int, int]) -> int:
        """The id whose turn it is among those given; with no weight at all, the first. ValueError when none is given."""
        best, total = None, 0
        for id, weight in weights.items():
            self.current[id] = now = self.current.get(id, 0) + weight
            total += weight
            if best is None or now > self.current[best]:
                best = id
        if best is None:
            raise ValueError("nothing to choose from")
        self.current[best] -= total
        return best

    def peek(self, weights: Mapping[int, int]) -> int:
        """Whose turn it is, without taking it."""
        return Wheel(self.current).turn(weights)


@dataclass(slots=True)
class _Group:
    """What is remembered of nodes that take turns. turns: how often they did."""

    strategy: str
    nodes: tuple[Node, ...]
    wheel: Wheel = field(default_factory=Wheel)
    turns: int = 0

    @property
    def weights(self) -> dict[int, int]:
        return {node.id: self.weight(node) for node in self.nodes}

    def weight(self, node: Node) -> int:
        return node.weight if self.strategy == "weighted" else 1

    def copy(self) -> _Group:
        return _Group(self.strategy, self.nodes, Wheel(self.wheel.current), self.turns)


@dataclass(slots=True)
class _Memory:
    shape: tuple[tuple[Node, ...], str, str]
    groups: dict[str, _Group]


class RouteState:
    """What one process knows beyond configuration: whose turn it is, who is busy, who is fast.

    began, ended: a request at a provider. chance: a random number below its argument.
    Safe to use from several threads.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[int], int] = random.randrange,
    ) -> None:
        self.speeds = Speeds()
        self.in_flight: Counter[int] = Counter()
        self._clock = clock
        # The interpreter's own generator is seeded anew in a forked worker; one of ours would begin everywhere the same.
        self._chance = chance
        self._memories: dict[int, _Memory] = {}
        self._keys: dict[int, Wheel] = {}
        self._lock = threading.Lock()

    def began(self, provider_id: int) -> None:
        self.in_flight[provider_id] += 1

    def ended(self, provider_id: int) -> None:
        self.in_flight[provider_id] -= 1
        if self.in_flight[provider_id] <= 0:
            del self.in_flight[provider_id]

    def answered(self, provider_id: int, model: str, ttft_ms: float) -> None:
        """The first token of an answer came, so many milliseconds after it was asked for."""
        self.speeds.observe(provider_id, model, ttft_ms, self._clock())

    def turn_of_key(self, provider_id: int, weights: Mapping[int, int]) -> int:
        """Of several keys of one provider, the one whose turn it is; from a random place, as with the nodes of a route."""
        with self._lock:
            wheel = self._keys.get(provider_id)
            if wheel is None:
                wheel = self._keys[provider_id] = Wheel()
                for _ in range(self._chance(max(1, min(sum(weights.values()), MOST_STEPS)))):
                    wheel.turn(weights)
            return wheel.turn(weights)

    def order(
        self,
        route: Route,
        options: Sequence[Option],
        *,
        hint: str = "",
        avoid: Collection[int] = (),
        peek: bool = False,
        price: PriceToCompare = unknown_price,
    ) -> list[Ranked]:
        """All options, in the order to try them.

        avoid: providers that cannot answer now; they take no turns and come last. peek: remember nothing of it. price: of
        options whose node has none of its own.
        """
        with self._lock:
            groups = self._groups(route)
            ordered: list[Ranked] = []
            served = peek
            for key, strategy, indexes in _parts(route, groups, options, hint):
                asked = not served and any(options[index].node.provider_id not in avoid for index in indexes)
                served = served or asked
                # Only those who are asked take a turn; the groups behind them wait with theirs.
                group = groups[key] if asked else groups[key].copy()
                ordered += self._ranked(group, strategy, options, indexes, avoid, price)
            if avoid:
                ordered.sort(key=lambda each: options[each.index].node.provider_id in avoid)
            return ordered

    def describe(self, route: Route) -> dict[str, Any]:
        """The state as the API tells it: per group, the place of the node whose turn is next."""
        with self._lock:
            groups = self._groups(route)
            providers = {node.provider_id for node in route.nodes}
            return {
                "route_id": route.id,
                "route_name": route.name,
                "state": {
                    "round_robin_indices": {key: _next(group) for key, group in groups.items()},
                    "strategies": {key: group.strategy for key, group in groups.items()},
                    "in_flight": {str(each): self.in_flight.get(each, 0) for each in sorted(providers)},
                    "ttft_ms": self._speeds_of(providers),
                },
            }

    def _speeds_of(self, providers: Collection[int]) -> dict[str, float]:
        known = self.speeds.known(self._clock())
        return {f"{id}/{model}": round(speed, 1) for (id, model), speed in known.items() if id in providers}

    def _groups(self, route: Route) -> dict[str, _Group]:
        """What is remembered of the route; anew when its nodes, mode or strategy are others than before."""
        shape = (route.nodes, route.mode, route.strategy)
        memory = self._memories.get(route.id)
        if memory is None or memory.shape != shape:
            memory = _Memory(shape, {key: self._begun(group) for key, group in _grouped(route).items()})
            self._memories[route.id] = memory
        return memory.groups

    def _begun(self, group: _Group) -> _Group:
        """A group at a random place of its round."""
        weights = group.weights
        for _ in range(self._chance(max(1, min(sum(weights.values()), MOST_STEPS)))):
            group.wheel.turn(weights)
        group.turns = self._chance(EXPLORE_EVERY)
        return group

    def _ranked(
        self,
        group: _Group,
        strategy: str,
        options: Sequence[Option],
        indexes: Sequence[int],
        avoid: Collection[int],
        price: PriceToCompare,
    ) -> list[Ranked]:
        """One of the best takes its turn; behind it the others by measure, and by how near their own turn is."""
        group.turns += 1
        late = _lateness(strategy, options, indexes)
        ranked = {index: self._measured(group, strategy, options[index], index, price) for index in indexes}
        standing = {
            index: (options[index].node.provider_id in avoid, late[index], ranked[index].measure)
            for index in indexes
        }
        best = min(standing.values())
        tied = {options[index].node.id: options[index].node for index in indexes if standing[index] == best}
        turn = group.wheel.turn({id: group.weight(node) for id, node in tied.items()})
        current = group.wheel.current

        def place(index: int) -> tuple[Any, ...]:
            node = options[index].node
            first = standing[index] == best and node.id == turn
            return (not first, *standing[index], -current.get(node.id, 0))

        return [ranked[index] for index in sorted(indexes, key=place)]

    def _measured(
        self, group: _Group, strategy: str, option: Option, index: int, price: PriceToCompare
    ) -> Ranked:
        node, unknown = option.node, math.inf
        measure = 0.0
        if strategy == "failover":
            measure = float(group.nodes.index(node))
        elif strategy == "weighted":
            measure = float(node.weight == 0)
        elif strategy == "least-busy":
            measure = float(self.in_flight.get(node.provider_id, 0))
        elif strategy == "fastest":
            speed = self.speeds.of(node.provider_id, option.model, self._clock())
            explored = -1.0 if group.turns % EXPLORE_EVERY == 0 else unknown
            measure = explored if speed is None else speed
        elif strategy == "cheapest":
            known = price(node.provider_id, option.model) if node.price is None else node.price
            measure = unknown if known is None else known
        return Ranked(index, strategy, measure)


def _lateness(strategy: str, options: Sequence[Option], indexes: Sequence[int]) -> dict[int, int]:
    """A node's first model stands for it, and its others come after all nodes had theirs: a node that fails does so
    with each of its models. Speed and price are those of a model, so there each model that a node names stands for itself."""
    seen: Counter[int] = Counter()
    late = {}
    for index in indexes:
        node = options[index].node
        late[index] = 0 if strategy in {"fastest", "cheapest"} and node.models else seen[node.id]
        seen[node.id] += 1
    return late


def _grouped(route: Route) -> dict[str, _Group]:
    """The nodes that take turns with each other: those of a priority in mode multi, else all, under the route's id."""
    found: dict[int, list[Node]] = {}
    for node in route.nodes:
        found.setdefault(node.priority if route.mode == "multi" else route.id, []).append(node)
    return {str(key): _Group(_strategy(route, found[key]), tuple(found[key])) for key in sorted(found)}


def _strategy(route: Route, nodes: Sequence[Node]) -> str:
    """The first node that names one decides for its group."""
    return next((node.strategy for node in nodes if node.strategy), route.strategy)


def _parts(
    route: Route, groups: Mapping[str, _Group], options: Sequence[Option], hint: str
) -> list[tuple[str, str, list[int]]]:
    """(group, strategy, indexes of options) of those that are tried one after the other."""
    everything = range(len(options))
    if route.mode == "multi":
        split = [
            (key, group.strategy, [i for i in everything if options[i].node in group.nodes])
            for key, group in groups.items()
        ]
    elif route.mode == "specific":
        key = str(route.id)
        hinted = [i for i in everything if hint and matches(options[i].model, hint)]
        others = [i for i in everything if i not in hinted]
        split = [(key, groups[key].strategy, hinted), (key, "failover", others)] if options else []
    else:
        split = [(key, group.strategy, list(everything)) for key, group in groups.items()]
    return [part for part in split if part[2]]


def _next(group: _Group) -> int:
    """The place in the group of the node whose turn is next."""
    turn = group.wheel.peek({id: weight for id, weight in group.weights.items() if weight} or group.weights)
    return [node.id for node in group.nodes].index(turn)


ROUTES = RouteState()
"""This process's."""
