"""The configuration as requests see it: an immutable picture, built whole by `build()` in one consistent read.

A request uses one snapshot from start to end. Its `version` is `audit.Head.seq`, so the answer's `x-penstock-config` is
explained by the audit entry of that number.
"""

from __future__ import annotations

import ipaddress
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, NamedTuple, TypeVar

from django.db import connection, transaction
from django.db.models import Model

from audit.models import Head
from providers import adapters, keyring
from providers.errors import UnknownKind
from providers.fields import raw
from providers.keyring import WrongEncryptionKey
from providers.models import ActiveTarget, ApiKey, Provider, UpstreamModel
from providers.wire import Credential, Endpoint, Kind, Purpose, Quota, origin_of
from proxy import prices as price_table
from proxy.auth import Caller
from proxy.models import Budget, GatewayKey, ModelRoute, OwnerLimits, PriceList, RouteNode
from proxy.needs import UNKNOWN, ModelFacts
from proxy.owners import text_of
from proxy.price_book import PriceBook
from proxy.price_source import vendor_of
from proxy.pricing import Price
from proxy.purses import Allowance
from proxy.strategies import Node, Route

logger = logging.getLogger(__name__)

OF = {
    "gateway_key": "this key",
    "user": "this key's owner",
    "team": "this key's team",
    "provider": "the provider",
}
"""Whose a budget is, in the words of an error."""

Row = TypeVar("Row", bound=Model)
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Upstream:
    """An enabled provider: how to talk to it, and with which keys (default first). budget: the id of its own, if it has one."""

    endpoint: Endpoint
    kind: Kind
    priority: int
    purposes: frozenset[str]
    credentials: tuple[Credential, ...]
    models: tuple[str, ...]
    budget: int | None = None

    @property
    def id(self) -> int:
        return self.endpoint.provider_id

    @property
    def slug(self) -> str:
        return self.endpoint.slug

    @property
    def vendor(self) -> str:
        """Whose price list its models are in."""
        return vendor_of(self.endpoint.kind, self.endpoint.base_url)


class Choice(NamedTuple):
    """A model of a provider that may be asked; without `credential`, all keys of the provider serve.

    node: the route's node that leads there, where a route does.
    """

    provider_id: int
    model: str = ""
    credential: Credential | None = None
    node: Node | None = None


@dataclass(frozen=True, slots=True)
class Snapshot:
    """standings: what `selection` has worked out from this picture so far, and need not again."""

    version: int = 0
    callers: Mapping[str, Caller] = field(default_factory=dict)
    upstreams: Mapping[int, Upstream] = field(default_factory=dict)
    by_slug: Mapping[str, int] = field(default_factory=dict)
    catalogue: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    facts: Mapping[tuple[int, str], ModelFacts] = field(default_factory=dict)
    active: Mapping[str, tuple[Choice, ...]] = field(default_factory=dict)
    routes: Mapping[str, Route] = field(default_factory=dict)
    budgets: Mapping[int, Allowance] = field(default_factory=dict)
    prices: PriceBook = field(default_factory=PriceBook)
    price_list_broken: bool = False
    standings: dict[Any, Any] = field(init=False, default_factory=dict, compare=False, repr=False)

    def caller_is_good(self, caller: Caller, now: float) -> bool:
        """Whether a key that was good when its request began still is; a rotated one is."""
        present = self.callers.get(caller.key_id)
        return present is not None and not present.expired(now)

    def facts_of(self, provider_id: int, model: str) -> ModelFacts:
        """What is known of a model; nothing of one that its provider does not list."""
        return self.facts.get((provider_id, model), UNKNOWN)

    def price(self, provider_id: int, model: str) -> Price | None:
        """What a model costs now; None when nobody knows, which is not the same as free."""
        upstream = self.upstreams.get(provider_id)
        if upstream is None:
            return None
        return self.prices.price(provider_id, upstream.vendor, model, time.time())

    def price_to_compare(self, provider_id: int, model: str) -> float | None:
        """US dollars per million tokens, to compare models by."""
        price = self.price(provider_id, model)
        return None if price is None else price.blended


def build() -> Snapshot:
    """Read everything in one transaction. Raises DatabaseError when the database is away.

    The keyring is opened again in the same read, so a rotation reaches this process with the rows it sealed.
    """
    with one_consistent_read():
        version = Head.objects.values_list("seq", flat=True).get(pk=1)
        _refresh_keyring()
        budgets = list(Budget.objects.all())
        budgets_of = _by_subject(budgets)
        callers = {caller.key_id: caller for caller in _callers(budgets_of)}
        credentials = _credentials()
        models = _models()
        upstreams = {each.id: each for each in _upstreams(credentials, models, budgets_of)}
        active = _active()
        routes = {route.name: route for route in _routes()}
        prices = price_table.book({each.vendor for each in upstreams.values()}, upstreams.keys())
        price_list_broken = PriceList.objects.exclude(problem="").exists()
    return Snapshot(
        version=version,
        callers=callers,
        upstreams=upstreams,
        by_slug={each.slug: each.id for each in upstreams.values()},
        catalogue=_catalogue(upstreams),
        facts={
            (provider_id, name): facts
            for provider_id, rows in models.items()
            for name, facts in rows
            if provider_id in upstreams
        },
        active=active,
        routes=routes,
        budgets={row.pk: Allowance(row.pk, OF[row.subject_kind], row.window, row.hard) for row in budgets},
        prices=prices,
        price_list_broken=price_list_broken,
    )


@contextmanager
def one_consistent_read() -> Iterator[None]:
    """REPEATABLE READ on PostgreSQL; on SQLite a plain BEGIN, because Django's IMMEDIATE one would block writers."""
    if connection.vendor == "postgresql":
        with transaction.atomic():
            if not connection.savepoint_ids:
                connection.cursor().execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
            yield
        return
    if connection.in_atomic_block:
        yield
        return
    with connection.cursor() as cursor:
        cursor.execute("BEGIN")
        try:
            yield
        finally:
            cursor.execute("ROLLBACK")


def _refresh_keyring() -> None:
    """A keyring that no longer opens leaves the one in memory; each value then says for itself whether it opens."""
    try:
        keyring.load_if_changed()
    except WrongEncryptionKey:
        return


def _readable(rows: Iterable[Row], make: Callable[[Row], Made]) -> Iterator[Made]:
    """What `make` makes of each row. One that was written past the forms, and makes no sense, is left out, so that it
    cannot keep every later change from everybody."""
    for row in rows:
        try:
            yield make(row)
        except (ValueError, TypeError, AttributeError, UnknownKind) as error:
            logger.warning("left out %s %s: %s", row._meta.label, row.pk, type(error).__name__)


def _by_subject(rows: Iterable[Budget]) -> Mapping[tuple[str, int], int]:
    """(column of Budget, id of the key, user, team or provider) to the id of its budget."""
    return {(row.subject_kind, getattr(row, f"{row.subject_kind}_id")): row.pk for row in rows}


def _callers(budgets: Mapping[tuple[str, int], int]) -> Iterator[Caller]:
    rows = GatewayKey.objects.filter(enabled=True, revoked_at=None).select_related("owner", "team")
    good = (row for row in rows.iterator() if row.owner is None or row.owner.is_active)
    quotas = {(row.owner_id, row.team_id): row.quota() for row in OwnerLimits.objects.all()}
    emptied = _caches_emptied()

    def make(row: GatewayKey) -> Caller:
        return _caller(
            row, quotas.get((row.owner_id, row.team_id)), emptied=emptied, budgets=_budgets_of(row, budgets)
        )

    return _readable(good, make)


def _budgets_of(row: GatewayKey, budgets: Mapping[tuple[str, int], int]) -> tuple[int, ...]:
    """The budgets that all requests of a key are held against: its own, its owner's, its team's."""
    if not budgets:
        return ()
    subjects = (("gateway_key", row.pk), ("user", row.owner_id), ("team", row.team_id))
    return tuple(budgets[kind, pk] for kind, pk in subjects if pk is not None and (kind, pk) in budgets)


def _caches_emptied() -> Mapping[str, datetime]:
    """Scope to when its cache was last emptied, by whichever of its keys, for the scopes where it ever was."""
    rows = GatewayKey.objects.filter(cache_emptied_at__isnull=False).order_by("cache_emptied_at")
    return {_scope(row): row.cache_emptied_at for row in rows.iterator() if row.cache_emptied_at}


def _scope(row: GatewayKey) -> str:
    """Who shares cached answers: the keys of a person or a team, else nobody but the key itself."""
    if row.team_id is not None:
        return f"team:{row.team_id}"
    return f"key:{row.key_id}" if row.owner_id is None else f"user:{row.owner_id}"


def _caller(
    row: GatewayKey, owner_quota: Quota | None, *, emptied: Mapping[str, datetime], budgets: tuple[int, ...]
) -> Caller:
    scope = _scope(row)
    return Caller(
        id=row.pk,
        key_id=row.key_id,
        name=row.name,
        owner=text_of(row.holder),
        digest=raw(row.hmac),
        pepper=row.pepper,
        previous_digest=raw(row.previous_hmac),
        previous_pepper=row.previous_pepper or 0,
        previous_until=row.previous_until.timestamp() if row.previous_until else 0.0,
        expires_at=row.expires_at.timestamp() if row.expires_at else None,
        requests_per_minute=row.requests_per_minute,
        tokens_per_minute=row.tokens_per_minute,
        max_concurrency=row.max_concurrency,
        resume=row.resume_streams,
        budgets=budgets,
        allowed_models=tuple(_texts(row.allowed_models)),
        allowed_networks=tuple(ipaddress.ip_network(each) for each in _texts(row.allowed_networks)),
        user_id=row.owner_id,
        team_id=row.team_id,
        owner_quota=owner_quota,
        record_text=row.record_text,
        cache_seconds=row.cache_seconds,
        cache_scope=f"{scope} {emptied.get(scope, '')}",
    )


def _texts(value: object) -> list[str]:
    """A list of texts; anything else raises, since an empty list would allow everything."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TypeError
    return value


def _credentials() -> Mapping[int, list[Credential]]:
    credentials: defaultdict[int, list[Credential]] = defaultdict(list)
    for key in ApiKey.objects.filter(enabled=True).order_by("-is_default", "id").iterator():
        credentials[key.provider_id].append(key.credential())
    return credentials


def _models() -> Mapping[int, list[tuple[str, ModelFacts]]]:
    models: defaultdict[int, list[tuple[str, ModelFacts]]] = defaultdict(list)
    rows = (
        UpstreamModel.objects.filter(enabled=True)
        .order_by("id")
        .values_list("provider_id", "name", "context_window", "dimensions", "capabilities", "purposes")
    )
    for provider_id, name, window, dimensions, capabilities, purposes in rows.iterator():
        facts = (window, dimensions, _words(capabilities), _words(purposes))
        # Most models of a long list have the same facts, namely none.
        models[provider_id].append((name, ModelFacts(*facts) if any(facts) else UNKNOWN))
    return models


def _words(value: object) -> frozenset[str]:
    return (
        frozenset(each for each in value if isinstance(each, str)) if isinstance(value, list) else frozenset()
    )


def _upstreams(
    credentials: Mapping[int, list[Credential]],
    models: Mapping[int, list[tuple[str, ModelFacts]]],
    budgets: Mapping[tuple[str, int], int],
) -> Iterator[Upstream]:
    def make(provider: Provider) -> Upstream:
        endpoint = provider.endpoint()
        origin_of(endpoint.base_url)  # raises for what is no address at all
        return Upstream(
            endpoint=endpoint,
            kind=adapters.kind(provider.kind),
            priority=provider.priority,
            purposes=frozenset(_purposes(provider)),
            credentials=tuple(credentials.get(provider.pk, ())),
            models=tuple(name for name, _ in models.get(provider.pk, ())),
            budget=budgets.get(("provider", provider.pk)),
        )

    return _readable(Provider.objects.filter(enabled=True).iterator(), make)


def _purposes(provider: Provider) -> Iterator[Purpose]:
    if provider.use_for_chat:
        yield "chat"
    if provider.use_for_embeddings:
        yield "embeddings"
    if provider.use_for_reranking:
        yield "reranking"


def _active() -> Mapping[str, tuple[Choice, ...]]:
    active: defaultdict[str, list[Choice]] = defaultdict(list)
    for target in ActiveTarget.objects.select_related("active", "api_key").order_by("active", "position"):
        key = target.api_key
        if key is not None and not key.enabled:
            continue
        credential = key.credential() if key is not None else None
        active[target.active.purpose].append(Choice(target.provider_id, target.model, credential))
    return {purpose: tuple(choices) for purpose, choices in active.items()}


def _routes() -> Iterator[Route]:
    return _readable(ModelRoute.objects.filter(is_active=True).prefetch_related("nodes"), route_of)


def route_of(row: ModelRoute) -> Route:
    """A route as requests see it. Raises TypeError for one that was written past the forms and makes no sense."""
    return Route(
        id=row.pk,
        name=row.name,
        mode=row.mode,
        strategy=row.strategy,
        nodes=tuple(_node(node) for node in row.nodes.all()),
        resume=row.resume,
    )


def _node(row: RouteNode) -> Node:
    price = row.metadata.get("price") if isinstance(row.metadata, dict) else None
    return Node(
        id=row.pk,
        provider_id=row.provider_id,
        models=tuple(_texts(row.models)),
        strategy=row.strategy,
        weight=row.weight,
        priority=row.priority,
        price=float(price) if isinstance(price, int | float) and not isinstance(price, bool) else None,
    )


def _catalogue(upstreams: Mapping[int, Upstream]) -> Mapping[str, tuple[int, ...]]:
    """Model name to the providers that have it, by priority, then id."""
    catalogue: defaultdict[str, list[int]] = defaultdict(list)
    for upstream in sorted(upstreams.values(), key=lambda each: (each.priority, each.id)):
        for name in upstream.models:
            catalogue[name].append(upstream.id)
    return {name: tuple(ids) for name, ids in catalogue.items()}
