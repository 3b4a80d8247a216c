"""From what configuration offers to what may be dialled now: who is down, whose circuit is open, which key is used."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from providers.wire import Credential
from proxy.pricing import Price
from proxy.snapshot import Choice, Upstream
from proxy.weather import Weather

Named = tuple[Upstream, Choice]
Turn = Callable[[int, Mapping[int, int]], int]
"""(provider id, weights by key id) to the key whose turn it is."""

NONE: Mapping[int, float] = {}
NO_KEY: Final = "no usable key"


class Candidate(NamedTuple):
    """One upstream, the model to ask it for, and the key to ask with.

    spares: its other keys, for when this one is refused or limited. window: of the model, in tokens, where it is known.
    price: of the model, where it is known.
    """

    upstream: Upstream
    model: str
    credential: Credential | None = None
    spares: tuple[Credential, ...] = ()
    window: int | None = None
    price: Price | None = None

    @property
    def full_name(self) -> str:
        return f"{self.upstream.slug}/{self.model}"

    @property
    def rests_as(self) -> int:
        """What `Cooldowns` know its key as."""
        return rest_of(self.upstream.id, self.credential)


def rest_of(provider_id: int, credential: Credential | None) -> int:
    return -provider_id if credential is None else credential.key_id


class Conditions(NamedTuple):
    """What may not be dialled now, apart from configuration. open_circuits, resting: for how many seconds more.

    may_force: whether an open circuit may be tried when there is nobody else.
    """

    weather: Weather
    open_circuits: Mapping[int, float] = NONE
    resting: Mapping[int, float] = NONE
    may_force: Callable[[int], bool] = lambda provider_id: True

    def nothing_against(self, providers: frozenset[int]) -> bool:
        """Whether these providers and all keys are as configured: nobody is down or resting, no circuit is open."""
        return (
            not self.resting
            and not self.weather.rejected
            and providers.isdisjoint(self.weather.down)
            and providers.isdisjoint(self.open_circuits)
        )


@dataclass(slots=True)
class Sorted:
    """candidates: who may be dialled, in order. trace: a line for each. waits: seconds until a key that rests may be used."""

    candidates: list[Candidate] = field(default_factory=list)
    trace: list[str] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)

    @property
    def keyless(self) -> bool:
        """Whether it is only for want of keys that nobody is there."""
        return bool(self.trace) and all(line.endswith(NO_KEY) for line in self.trace)


def sort_out(
    named: Sequence[Named],
    conditions: Conditions,
    *,
    turn: Turn | None = None,
    window: Callable[[Named], int | None],
) -> Sorted:
    """Leave out who cannot answer now; when nobody is left, the first who is only said to be down gets a forced trial.

    turn: decides between several keys of a provider; without it nobody's turn is taken.
    """
    found = Sorted()
    trials: list[Candidate] = []
    for upstream, choice in named:
        name = f"{upstream.slug}/{choice.model}"
        keys, wait = usable_keys(upstream, choice, conditions)
        if wait is not None:
            found.waits.append(wait)
            found.trace.append(f"{name}: limited, for {wait:.0f} s more")
            continue
        if not keys:
            found.trace.append(f"{name}: {NO_KEY}")
            continue
        first, *spares = _in_turn(upstream.id, keys, turn)
        candidate = Candidate(
            upstream, choice.model, first, tuple(each for each in spares if each), window((upstream, choice))
        )
        problem, on_trial = _problem(upstream.id, conditions)
        found.trace.append(f"{name}: {problem or 'taken'}")
        if not problem:
            found.candidates.append(candidate)
        elif on_trial:
            trials.append(candidate)
    if not found.candidates and trials:
        found.trace.append(f"{trials[0].full_name}: forced trial")
        found.candidates = trials[:1]
    return found


def _problem(provider_id: int, conditions: Conditions) -> tuple[str, bool]:
    """What keeps a provider from being dialled, or nothing; and whether it may be tried when there is nobody else."""
    down = conditions.weather.down.get(provider_id)
    if provider_id in conditions.open_circuits:
        overridden = provider_id in conditions.weather.overridden
        wait = conditions.open_circuits[provider_id]
        return f"circuit open, for {wait:.0f} s more", not overridden and conditions.may_force(provider_id)
    if down is not None:
        return f"down ({down[:80]})", provider_id not in conditions.weather.overridden
    return "", False


def usable_keys(
    upstream: Upstream, choice: Choice, conditions: Conditions
) -> tuple[Sequence[Credential | None], float | None]:
    """The keys to dial with, and, where all of them rest, for how many seconds. `[None]`: none is needed."""
    resting, rejected = conditions.resting, conditions.weather.rejected
    keys: Sequence[Credential | None] = (
        upstream.credentials if choice.credential is None else (choice.credential,)
    )
    if not keys and not upstream.kind.needs_key:
        keys = (None,)
    if rejected and choice.credential is None:
        # When every key was refused, trying one again is how a key that was mended at the vendor comes back.
        keys = [each for each in keys if each is None or each.key_id not in rejected] or keys
    if not resting:
        return keys, None
    awake = [each for each in keys if rest_of(upstream.id, each) not in resting]
    if keys and not awake:
        return (), min(resting[rest_of(upstream.id, each)] for each in keys)
    return awake, None


def _in_turn(
    provider_id: int, keys: Sequence[Credential | None], turn: Turn | None
) -> Sequence[Credential | None]:
    """The key whose turn it is by weight, then the others."""
    if len(keys) == 1 or turn is None:
        return keys
    chosen = turn(provider_id, {each.key_id: each.weight for each in keys if each is not None})
    return sorted(keys, key=lambda each: each is not None and each.key_id != chosen)
