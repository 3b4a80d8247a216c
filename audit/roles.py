"""Who may do what: one table for the API and, as Django permissions of groups, for the admin.

A role is a Django group; other groups are teams. A superuser is an administrator. What is not in the table is denied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final

from django.apps import AppConfig, apps
from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser, Group, Permission, User
from django.db import DEFAULT_DB_ALIAS
from django.db.models import Model, Q, signals
from django.db.models.deletion import Collector

from audit.changes import changes


class Role(StrEnum):
    VIEWER = "viewer"
    OPERATOR = "operator"
    ADMINISTRATOR = "administrator"
    MEMBER = "member"


STAFF: Final = frozenset({Role.VIEWER, Role.OPERATOR, Role.ADMINISTRATOR})
"""These may log in to the admin; a member uses the API."""

_READ: Final = frozenset({"read"})
_WRITE: Final = frozenset({"read", "add", "change", "delete", "test", "probe", "override"})

TABLE: Final[Mapping[str, Mapping[Role, frozenset[str]]]] = MappingProxyType(
    {
        "providers": {Role.VIEWER: _READ, Role.OPERATOR: _WRITE},
        "models": {Role.VIEWER: _READ, Role.OPERATOR: _WRITE},
        "active": {Role.VIEWER: _READ, Role.OPERATOR: _WRITE},
        "routes": {Role.VIEWER: _READ, Role.OPERATOR: _WRITE},
        "prices": {Role.VIEWER: _READ, Role.OPERATOR: _WRITE},
        "api_keys": {Role.VIEWER: _READ, Role.OPERATOR: frozenset({"read", "add", "replace", "test"})},
        "gateway_keys": {
            Role.VIEWER: _READ,
            Role.OPERATOR: frozenset({"read", "add", "revoke", "rotate", "lend"}),
            Role.MEMBER: frozenset({"read", "revoke", "rotate", "lend"}),
        },
        "owner_limits": {Role.VIEWER: _READ, Role.OPERATOR: _READ},
        "usage": {Role.VIEWER: _READ, Role.OPERATOR: _READ, Role.MEMBER: _READ},
        "texts": {},
        "budgets": {Role.VIEWER: _READ, Role.OPERATOR: _READ, Role.MEMBER: _READ},
        "audit": {Role.OPERATOR: _READ},
        "stats": {Role.VIEWER: _READ, Role.OPERATOR: _READ},
        "logs": {},
        "backups": {},
        "key_stores": {},
        "allow_private": {},
        "users": {},
    }
)
"""Resource -> role -> actions. An administrator may do everything to every resource named here; a member's actions are
on what is his own. Lending a key is making a token for browsers that
stands for it. `key_stores` is writing a reference to a secret that is kept elsewhere."""

MODELS: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "providers": (
            "providers.provider",
            "providers.server",
            "providers.providerhealth",
            "providers.healthcheck",
            "providers.provideruse",
        ),
        "models": ("providers.upstreammodel",),
        "active": ("providers.activeprovider", "providers.activetarget"),
        "routes": ("proxy.modelroute", "proxy.routenode"),
        "prices": ("proxy.modelprice",),
        "api_keys": ("providers.apikey", "providers.keyuse"),
        "gateway_keys": ("proxy.gatewaykey", "proxy.gatewaykeyuse"),
        "owner_limits": ("proxy.ownerlimits",),
        "usage": ("proxy.usagerecord", "proxy.usagehour"),
        "texts": ("proxy.textrecord",),
        "budgets": ("proxy.budget", "proxy.budgetaccount"),
        "audit": ("audit.entry",),
    }
)
"""The models of a resource, as Django permissions name them."""

WRITTEN_BY_NOBODY: Final = frozenset(
    {
        "audit.entry",
        "audit.head",
        "providers.providerhealth",
        "providers.healthcheck",
        "providers.keyring",
        "providers.keyuse",
        "providers.provideruse",
        "providers.jobrun",
        "proxy.gatewaykeyuse",
        "proxy.budgetaccount",
        "proxy.budgetgrant",
        "proxy.pricelist",
        "proxy.usagehour",
        "proxy.usagerecord",
        "proxy.textrecord",
        "proxy.spoolsegment",
    }
)
"""Rows that the gateway writes itself; not even an administrator has a form for them."""

_DJANGO: Final[Mapping[str, frozenset[str]]] = MappingProxyType(
    {
        "view": _READ,
        "add": frozenset({"add"}),
        # Django knows no finer word for replacing one column.
        "change": frozenset({"change", "replace", "revoke", "rotate"}),
        "delete": frozenset({"delete"}),
    }
)

AnyUser = AbstractBaseUser | AnonymousUser


def roles_of(user: AnyUser) -> frozenset[Role]:
    """The roles of a user, asked of the database once per request's user object."""
    if not user.is_active:
        return frozenset()
    known: frozenset[Role] | None = getattr(user, "_penstock_roles", None)
    if known is None:
        groups = Group.objects.filter(user=user.pk, name__in=list(Role))
        names = set(groups.values_list("name", flat=True))
        if getattr(user, "is_superuser", False):
            names.add(Role.ADMINISTRATOR)
        known = frozenset(Role(name) for name in names)
        user._penstock_roles = known  # type: ignore[attr-defined]
    return known


def may(user: AnyUser, resource: str, action: str) -> bool:
    """Whether the user may do this to something of the resource, be it only to what is his own."""
    return any(_allows(role, resource, action) for role in roles_of(user))


def own_only(user: AnyUser, resource: str, action: str) -> bool:
    """Whether what `may` allows reaches no further than the user's own things."""
    return not any(_allows(role, resource, action) for role in roles_of(user) - {Role.MEMBER})


def may_delete(user: AnyUser, row: Model) -> bool:
    """Whether the user may delete a row and what goes with it. Raises ProtectedError or RestrictedError when it is in use."""
    collector = Collector(using=DEFAULT_DB_ALIAS)
    collector.collect([row])
    # What is deleted without being looked at has no entry in the log, so it is none of what people write.
    labels = {model._meta.label_lower for model in collector.data}
    gone = (resource for resource, models in MODELS.items() if labels.intersection(models))
    return all(may(user, resource, "delete") for resource in gone)


def somebody_administers() -> bool:
    """Whether anybody is left who may log in and has every right."""
    rights = Q(is_superuser=True) | Q(groups__name=Role.ADMINISTRATOR)
    return User.objects.filter(rights, is_active=True, is_staff=True).exists()


def _allows(role: Role, resource: str, action: str) -> bool:
    if resource not in TABLE or not action:
        return False
    return role is Role.ADMINISTRATOR or action in TABLE[resource].get(role, frozenset())


# -- the same table as Django permissions, for the admin ---------------------------------------------------------------


def connect() -> None:
    """Keep groups and staff status in step with the table; called when the application starts."""
    signals.post_migrate.connect(_after_migrate, dispatch_uid="audit-roles")
    signals.m2m_changed.connect(
        _members_changed, sender=User.groups.through, dispatch_uid="audit-roles-staff"
    )


def _after_migrate(sender: AppConfig, using: str, **kwargs: Any) -> None:
    """Once per migrate: when the last application's permissions have been made."""
    last = [config for config in apps.get_app_configs() if config.models_module is not None][-1]
    if using == "default" and sender.label == last.label:
        assign_permissions()


def assign_permissions() -> None:
    """Make the groups and give them exactly the table's permissions; changes nothing where nothing differs."""
    wanted = {role: set(_permissions(role)) for role in Role}
    present = {group.name: group for group in Group.objects.filter(name__in=list(Role))}
    groups = {role: set(present[role].permissions.all()) if role in present else None for role in Role}
    if all(groups[role] == wanted[role] for role in Role):
        return
    with changes(actor=None, via="system"):
        for role in Role:
            group = present.get(role) or Group.objects.create(name=role)
            group.permissions.set(wanted[role])


def _permissions(role: Role) -> Iterable[Permission]:
    """A member has none: he is no staff, and the admin knows no owner."""
    if role is Role.ADMINISTRATOR:
        forbidden = [*WRITTEN_BY_NOBODY]
        return Permission.objects.exclude(_of(forbidden, ("add", "change", "delete")))
    if role not in STAFF:
        return ()
    granted = Q(pk=None)
    for resource, labels in MODELS.items():
        actions = TABLE[resource].get(role, frozenset())
        verbs = [verb for verb, words in _DJANGO.items() if words & actions]
        written = [verb for verb in verbs if verb != "view"]
        granted |= _of(labels, [verb for verb in verbs if verb == "view"])
        granted |= _of([label for label in labels if label not in WRITTEN_BY_NOBODY], written)
    return Permission.objects.filter(granted)


def _of(labels: Iterable[str], verbs: Iterable[str]) -> Q:
    """The permissions of these verbs on these models ("providers.apikey")."""
    condition = Q(pk=None)
    verbs = tuple(verbs)
    for label in labels:
        app, model = label.split(".")
        names = [f"{verb}_{model}" for verb in verbs]
        condition |= Q(content_type__app_label=app, content_type__model=model, codename__in=names)
    return condition


def _members_changed(
    instance: Any, action: str, reverse: bool, pk_set: set[int] | None, **kwargs: Any
) -> None:
    """Whoever gets a staff role may log in to the admin; whoever loses the last one may not any more."""
    if action not in {"post_add", "post_remove", "post_clear"}:
        return
    if reverse:
        # `group.user_set.clear()` no longer tells whom it was about; nobody's rights grow by that.
        users = User.objects.filter(pk__in=pk_set or ()) if instance.name in STAFF else User.objects.none()
    else:
        touched = pk_set is None or Group.objects.filter(pk__in=pk_set, name__in=list(STAFF)).exists()
        users = User.objects.filter(pk=instance.pk) if touched else User.objects.none()
    for user in users:
        staff = user.is_superuser or user.groups.filter(name__in=list(STAFF)).exists()
        if user.is_staff != staff:
            user.is_staff = staff
            user.save(update_fields=["is_staff"])
        if not reverse:
            instance.is_staff = staff
