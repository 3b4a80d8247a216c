"""What a configuration document is made of. To add a model, write a `Section` and put it into `SECTIONS`.

Most sections are columns alone. Where a row is more than its columns (a key's secret, the nodes of a route), `describe` says
what is written beside them and `save` takes it back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from django.contrib.auth.models import Group, User
from django.db.models import Model, Q, QuerySet

from providers.adapters import KINDS
from providers.models import ActiveProvider, ApiKey, Provider, UpstreamModel
from providers.models.limited import LIMITS
from proxy.configuration import saving, values
from proxy.configuration.saving import Draft
from proxy.models import Budget, GatewayKey, ModelPrice, ModelRoute, OwnerLimits
from proxy.models.budgets import SUBJECTS
from proxy.models.prices import NEVER_HELD, PARTS
from proxy.routes import DEFAULTS as NODE

Entry = dict[str, Any]
T = TypeVar("T", bound=Model)


def _nothing(row: Any, *, sealed: bool) -> Entry:
    return {}


def _never(row: Any) -> bool:
    return False


def _counts(entry: Mapping[str, Any]) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Section:
    """One kind of thing.

    found_by: sets of columns that identify a row, tried in order; the last is what an entry must have, or, with `one_of`,
    any of them.
    columns: what is written, in this order. A column that an entry leaves out stays as it is, and in a new row is the default.
    sealed: columns that only a backup holds. extra: what `describe` adds and `save` takes.
    by_itself: tells rows that come by themselves: a file for people leaves them out, and pruning keeps them.
    backup_only: a section that only backups have. pruned: whether rows that a document does not name may be deleted.
    only: which of the rows are written into a document.
    apart: rows that are history and no configuration: no document has them or means them. passed_over: why an entry of an older
    document is none, or empty.
    """

    name: str
    model: type[Model]
    found_by: tuple[tuple[str, ...], ...]
    columns: tuple[str, ...]
    sealed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    describe: Callable[..., Entry] = _nothing
    save: Callable[[Draft], None] = saving.save
    related: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    by_itself: Callable[[Any], bool] = _never
    backup_only: bool = False
    one_of: bool = False
    pruned: bool = True
    only: Callable[[QuerySet[Any]], QuerySet[Any]] = field(default=lambda rows: rows)
    apart: Q = field(default_factory=Q)
    passed_over: Callable[[Mapping[str, Any]], str] = _counts

    @property
    def fields(self) -> tuple[str, ...]:
        """Every name that an entry may have."""
        return (*self.columns, *self.sealed, *self.extra)

    @property
    def owned(self) -> bool:
        """Whether its rows can belong to a file."""
        return "managed_by" in self.columns

    def all_rows(self) -> QuerySet[Any]:
        manager: Any = self.model._default_manager
        rows: QuerySet[Any] = manager.select_related(*self.related).prefetch_related(*self.parts)
        return rows.exclude(self.apart)

    def entry(self, row: Any, *, sealed: bool) -> Entry:
        """The row as a document holds it."""
        columns = (*self.columns, *self.sealed) if sealed else self.columns
        return {name: values.read(row, name) for name in columns} | self.describe(row, sealed=sealed)


# -- what is more than columns -----------------------------------------------------------------------------------------


def _is_untouched_vendor(provider: Provider) -> bool:
    """As the migration made it, waiting for its first key."""
    kind = KINDS.get(provider.kind)
    there = kind is not None and provider.base_url == kind.base_url.rstrip("/")
    return there and not provider.self_hosted and not provider.enabled and not provider.keys.all()


def _was_found(model: UpstreamModel) -> bool:
    """Its provider told of it, and nobody switched it off."""
    return model.source == UpstreamModel.Source.DISCOVERED and model.enabled


def _targets(active: ActiveProvider, *, sealed: bool) -> Entry:
    return {
        "targets": [
            {
                "provider": target.provider.slug,
                "api_key": target.api_key.name if target.api_key else None,
                "model": target.model,
            }
            for target in active.targets.all()
        ]
    }


def _nodes(route: ModelRoute, *, sealed: bool) -> Entry:
    names = ("provider", *NODE)
    return {"nodes": [{name: values.read(node, name) for name in names} for node in route.nodes.all()]}


OWNS = Q(gateway_keys__isnull=False) | Q(owner_limits__isnull=False) | Q(budget__isnull=False)


def _owners(rows: QuerySet[Any]) -> QuerySet[Any]:
    """Whoever owns something in the document: users, or teams."""
    return rows.filter(OWNS).distinct()


def _overrides(prices: QuerySet[ModelPrice]) -> QuerySet[ModelPrice]:
    """What people said; the rest comes with the price list."""
    return prices.filter(source=ModelPrice.Source.OVERRIDE)


SECTIONS: tuple[Section, ...] = (
    Section(
        "users",
        User,
        found_by=(("username",),),
        columns=("username", "email", "is_active"),
        save=saving.save_user,
        only=_owners,
        backup_only=True,
        pruned=False,
    ),
    Section(
        "teams", Group, found_by=(("name",),), columns=("name",), only=_owners, backup_only=True, pruned=False
    ),
    Section(
        "providers",
        Provider,
        found_by=(("uid",), ("slug",), ("name",)),
        columns=(
            "uid", "slug", "name", "kind", "base_url", "custom_headers", "enabled", "priority", "use_for_chat",
            "use_for_embeddings", "use_for_reranking", "model_path", "allow_private", "ca_pem", "connect_timeout_seconds",
            "first_token_timeout_seconds", "idle_timeout_seconds", "request_timeout_seconds", "probe_interval_seconds",
            "metadata", "managed_by",
        ),
        parts=("keys",),
        save=saving.save_provider,
        by_itself=_is_untouched_vendor,
    ),
    Section(
        "api_keys",
        ApiKey,
        found_by=(("uid",), ("provider", "name")),
        columns=(
            "uid", "provider", "name", "enabled", "is_default", "weight", *LIMITS, "metadata", "managed_by",
        ),
        extra=("secret", "sealed"),
        describe=saving.describe_secret,
        related=("provider",),
        save=saving.save_api_key,
    ),
    Section(
        "models",
        UpstreamModel,
        found_by=(("provider", "name"),),
        columns=(
            "provider", "name", "purposes", "context_window", "dimensions", "capabilities", "enabled", "source", "managed_by",
        ),
        related=("provider",),
        save=saving.save_model,
        by_itself=_was_found,
    ),
    Section(
        "active",
        ActiveProvider,
        found_by=(("purpose",),),
        columns=("purpose", "managed_by"),
        extra=("targets",),
        describe=_targets,
        parts=("targets__provider", "targets__api_key"),
        save=saving.save_active,
    ),
    Section(
        "model_routes",
        ModelRoute,
        found_by=(("name",),),
        columns=("name", "mode", "strategy", "is_active", "resume", "config", "managed_by"),
        extra=("nodes",),
        describe=_nodes,
        parts=("nodes__provider",),
        save=saving.save_route,
    ),
    Section(
        "gateway_keys",
        GatewayKey,
        found_by=(("key_id",), ("name",)),
        columns=(
            "key_id", "name", "owner", "team", "enabled", "revoked_at", "expires_at", *LIMITS, "allowed_models",
            "allowed_networks", "resume_streams", "record_text", "cache_seconds", "managed_by",
        ),
        sealed=("cache_emptied_at", "hmac", "pepper", "last4", "previous_hmac", "previous_pepper", "previous_until"),
        related=("owner", "team"),
        save=saving.save_gateway_key,
    ),
    Section(
        "owner_limits",
        OwnerLimits,
        found_by=(("owner",), ("team",)),
        one_of=True,
        columns=("owner", "team", *LIMITS),
        related=("owner", "team"),
    ),
    Section(
        "budgets",
        Budget,
        found_by=tuple((subject,) for subject in SUBJECTS),
        one_of=True,
        columns=(*SUBJECTS, "amount", "window", "hard", "warn_at_percent"),
        related=SUBJECTS,
    ),
    Section(
        "prices",
        ModelPrice,
        found_by=(("provider", "model", "effective_from"),),
        columns=("provider", "model", "effective_from", "effective_until", *PARTS, "request", "tiers", "hours", "note"),
        save=saving.save_price,
        only=_overrides,
        apart=NEVER_HELD,
        passed_over=saving.never_held,
        pruned=False,
    ),
)  # fmt: skip
"""In the order in which they are written, so that what is referred to comes first; pruned in the opposite order."""

BY_NAME: Mapping[str, Section] = {section.name: section for section in SECTIONS}
