"""Which price a model of a provider has at a moment: names matched, dates honoured. Pure: no Django.

A price list names its models by clauses, as data: {"equals": text}, {"starts_with": text}, {"ends_with": text},
{"contains": text}, {"regex": text}, {"or": [...]}, {"and": [...]}. They are those of genai-prices and mean the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from proxy.pricing import Price

FOREVER = float("inf")
DAY = 86400
MOST_KNOWN = 10_000
"""Names whose price is remembered; anybody with a key may ask a provider for a model that does not exist."""

COMPACT_DATE = re.compile(r"(-)(20\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=-|:|$)")
TESTS: Mapping[str, Callable[[str, str], bool]] = {
    "equals": lambda name, text: name == text.lower(),
    "starts_with": lambda name, text: name.startswith(text.lower()),
    "ends_with": lambda name, text: name.endswith(text.lower()),
    "contains": lambda name, text: text.lower() in name,
    "regex": lambda name, text: bool(re.search(text, name)),
}


class Dated(NamedTuple):
    """A price from `since` until before `until` (epoch seconds). hours: (from, until, price), seconds of the day in UTC."""

    since: float
    until: float
    price: Price
    hours: tuple[tuple[int, int, Price], ...] = ()

    def at(self, now: float) -> Price | None:
        if not self.since <= now < self.until:
            return None
        second = now % DAY
        for start, end, price in reversed(self.hours):
            inside = start <= second < end if start <= end else second >= start or second < end
            if inside:
                return price
        return self.price


class Listed(NamedTuple):
    """A model of a vendor's list, its prices with the newest first."""

    match: Mapping[str, Any] | None
    model: str
    prices: tuple[Dated, ...]


class Override(NamedTuple):
    """What a person said about models of a provider; `model` may hold `*`."""

    model: str
    dated: Dated

    @property
    def order(self) -> tuple[bool, int, float]:
        """The most special first, then the newest."""
        return "*" in self.model, -len(self.model), -self.dated.since


class PriceBook:
    """lists: vendor to its models, in the order in which they are asked. overrides: provider id to what was said about it."""

    def __init__(
        self,
        lists: Mapping[str, Sequence[Listed]] | None = None,
        overrides: Mapping[int, Iterable[Override]] | None = None,
    ) -> None:
        self._lists = {vendor: _Index(listed) for vendor, listed in (lists or {}).items()}
        self._overrides = {
            provider_id: sorted(each, key=lambda override: override.order)
            for provider_id, each in (overrides or {}).items()
        }
        self._known: dict[tuple[int, str], tuple[Dated, ...]] = {}

    def price(self, provider_id: int, vendor: str, model: str, now: float) -> Price | None:
        """What the model of this provider costs at `now` (epoch seconds); None when nobody knows."""
        dated = self._known.get((provider_id, model))
        if dated is None:
            dated = tuple(self._find(provider_id, vendor, model))
            if len(self._known) < MOST_KNOWN:
                self._known[provider_id, model] = dated
        return next((price for each in dated if (price := each.at(now)) is not None), None)

    def _find(self, provider_id: int, vendor: str, model: str) -> Iterator[Dated]:
        for override in self._overrides.get(provider_id, ()):
            if override.model == model or ("*" in override.model and fnmatchcase(model, override.model)):
                yield override.dated
        if (index := self._lists.get(vendor)) is not None:
            yield from index.find(model)


class _Index:
    """The models of a list. Most have nothing but names, which are looked up; the others are asked one after the other."""

    def __init__(self, listed: Iterable[Listed]) -> None:
        self._named: dict[str, tuple[Dated, ...]] = {}
        self._others: list[Listed] = []
        for each in listed:
            names, whole = _names(each.match, each.model)
            for name in names:
                self._named.setdefault(name, each.prices)
            if not whole:
                self._others.append(each)

    def find(self, model: str) -> tuple[Dated, ...]:
        """genai-prices asks in lower case, and once more with a date written as it writes them: -20251211 is -2025-12-11."""
        name = model.lower()
        found = self._match(name)
        if found is None and (dashed := COMPACT_DATE.sub(r"\1\2-\3-\4", name)) != name:
            found = self._match(dashed)
        return found or ()

    def _match(self, name: str) -> tuple[Dated, ...] | None:
        found = self._named.get(name)
        if found is not None:
            return found
        return next((each.prices for each in self._others if matches(each.match, each.model, name)), None)


def _names(match: Mapping[str, Any] | None, model: str) -> tuple[list[str], bool]:
    """The names that a clause asks for, and whether these are all that it asks for."""
    if match is None:
        return ([], False) if "*" in model else ([model.lower()], True)
    parts = match.get("or", [match])
    names = [part["equals"].lower() for part in parts if "equals" in part]
    return names, len(names) == len(parts)


def matches(match: Mapping[str, Any] | None, model: str, name: str) -> bool:
    """Whether a clause, or without one the model's own name, which may hold `*`, means `name` (in lower case)."""
    if match is None:
        return fnmatchcase(name, model.lower())
    ((word, value),) = match.items()
    if word == "or":
        return any(matches(each, model, name) for each in value)
    if word == "and":
        return all(matches(each, model, name) for each in value)
    return TESTS[word](name, value)


def check_match(match: Any) -> None:
    """ValueError for what is no clause; asked when it is read, so that no request meets one."""
    if match is None:
        return
    if not isinstance(match, dict) or len(match) != 1:
        raise ValueError("not a clause")
    ((word, value),) = match.items()
    if word in {"or", "and"} and isinstance(value, list):
        for each in value:
            check_match(each)
            if each is None:
                raise ValueError("not a clause")
    elif word not in TESTS or not isinstance(value, str):
        raise ValueError("not a clause")
    elif word == "regex":
        try:
            re.compile(value)
        except re.error:
            raise ValueError("not a regular expression") from None
