"""The price list that comes with the package genai-prices, as data of ours. Nothing is asked of the network.

Units that are not counted here (images, audio, searches, cache writes for an hour) are left out. A model that has only such
units, or none, is not listed: its price is unknown, which is not the same as free.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import Decimal
from importlib.metadata import PackageNotFoundError, version
from typing import Any
from urllib.parse import urlsplit

from providers.adapters import KINDS, SELF_HOSTED, VENDORS
from proxy.models.prices import BEGINNING, price_of
from proxy.price_book import check_match
from proxy.pricing import nano_of

PACKAGE = "genai-prices"
FREE = ":free"
"""How OpenRouter's names end of models that cost nothing; elsewhere an empty price means that nobody wrote it down."""

ELSEWHERE: Mapping[str, tuple[str, ...]] = {
    "cerebras": ("api.cerebras.ai",),
    "minimax": ("api.minimax.io", "api.minimaxi.com"),
    "moonshotai": ("api.moonshot.ai", "api.moonshot.cn"),
    "novita": ("api.novita.ai",),
    "perplexity": ("api.perplexity.ai",),
    "voyageai": ("api.voyageai.com",),
    "x-ai": ("api.x.ai",),
}
"""Vendors that have no kind here and are reached as `openai-compatible`: the package's name for them, and their hosts."""

LISTED = frozenset({*VENDORS, *ELSEWHERE})
FREE_KINDS = frozenset({*SELF_HOSTED, "echo"})
HOSTS: Mapping[str, str] = {
    **{host: vendor for vendor, hosts in ELSEWHERE.items() for host in hosts},
    **{urlsplit(KINDS[name].base_url).hostname or "": name for name in VENDORS},
}


class PriceSourceBroken(Exception):
    """The list cannot be used; nothing of it is."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A price of a model from a moment on. rates: by the names of proxy.models.prices.RATES."""

    since: datetime
    rates: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Model:
    """A model of a vendor's list, its prices with the oldest first."""

    vendor: str
    name: str
    match: Mapping[str, Any]
    offers: list[Offer] = field(default_factory=list)


@functools.lru_cache(maxsize=4096)
def vendor_of(kind: str, base_url: str) -> str:
    """Whose price list a provider's models are in. One that only speaks OpenAI's dialect is known by its address."""
    if kind != "openai-compatible":
        return kind
    return HOSTS.get(urlsplit(base_url).hostname or "", kind)


def installed() -> str:
    """The package's version; empty when it is not there."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return ""


def read() -> tuple[str, list[Model]]:
    """The installed package's version and list. Raises PriceSourceBroken, whatever is wrong with it."""
    try:
        providers = importlib.import_module("genai_prices.data").providers
        models = list(_models(providers))
    except Exception as error:
        # Whatever a package of somebody else can do wrong when it is imported or read.
        raise PriceSourceBroken(f"{type(error).__name__}: {error}"[:200]) from error
    if not any(each.offers[-1].rates["prompt"] for each in models):
        raise PriceSourceBroken("no model in it costs anything")
    return installed(), models


def _models(providers: Iterable[Any]) -> Iterator[Model]:
    for provider in providers:
        if provider.id not in LISTED:
            continue
        for info in provider.models:
            match = clause_of(info.match)
            check_match(match)
            offers = list(_offers(info))
            for offer in offers:
                price_of(0, offer.rates)
            if offers:
                yield Model(provider.id, info.id, match, offers)


def clause_of(clause: Any) -> dict[str, Any]:
    """A clause as data; see proxy.price_book."""
    ((word, value),) = vars(clause).items()
    word = word.rstrip("_")
    return {word: [clause_of(each) for each in value] if word in {"or", "and"} else value}


def _offers(info: Any) -> Iterator[Offer]:
    """Oldest first. A price for hours of the day is part of the last one before it; none where a price is not known."""
    listed = info.prices if isinstance(info.prices, list) else [info]
    offers: list[Offer] = []
    for each in listed:
        rates = _rates(each.prices, free=info.id.endswith(FREE))
        if rates is None:
            return
        constraint: Any = getattr(each, "constraint", None)
        if hasattr(constraint, "start_time"):
            hours = {"from": _second(constraint.start_time), "until": _second(constraint.end_time)}
            offers[-1].rates["hours"].append({**rates, **hours})
            continue
        start: date | None = getattr(constraint, "start_date", None)
        since = datetime.combine(start, time(), UTC) if start is not None else BEGINNING
        offers.append(Offer(since, {**rates, "hours": []}))
    yield from sorted(offers, key=lambda offer: offer.since)


def _rates(prices: Any, *, free: bool) -> dict[str, Any] | None:
    """None where the package has no price for anything that is counted here."""
    told = {name: value for name, value in vars(prices).items() if value is not None}
    if not told.keys() & {"input_mtok", "output_mtok", "requests_kcount"} and not (free and not told):
        return None
    names = {
        "prompt": "input_mtok",
        "completion": "output_mtok",
        "cached": "cache_read_mtok",
        "cache_write": "cache_write_mtok",
        "reasoning": "output_reasoning_mtok",
    }
    rates: dict[str, Any] = {"tiers": {}}
    for name, key in names.items():
        value = told.get(key)
        if value is None:
            rates[name] = 0 if name in {"prompt", "completion"} else None
        elif hasattr(value, "tiers"):
            rates[name] = nano_of(value.base)
            rates["tiers"][name] = [[tier.start, nano_of(tier.price)] for tier in value.tiers]
        else:
            rates[name] = nano_of(value)
    rates["request"] = nano_of(told.get("requests_kcount", Decimal(0)) / 1000)
    return rates


def _second(moment: time) -> int:
    """Of the day, in UTC; genai-prices takes a time without a zone for UTC."""
    utc = datetime.combine(date(2000, 1, 1), moment, moment.tzinfo or UTC).astimezone(UTC)
    return utc.hour * 3600 + utc.minute * 60 + utc.second
