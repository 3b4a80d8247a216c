"""Signals of the watched models, turned into entries; a watched row is never changed outside a `changes()` block."""

from __future__ import annotations

from typing import Any

from django.apps import apps
from django.conf import settings
from django.db import models
from django.db.models import signals

from audit.changes import current, identity_of, own_block
from audit.diff import difference, state_of

# Signing in sets the date, and may renew the hash of an unchanged password; neither is a change of configuration.
BY_SIGNING_IN = frozenset({"last_login", "password"})


def connect() -> None:
    """Connect every model of AUDIT_WATCH, its proxies, and the through tables of its many-to-many fields."""
    watched = {apps.get_model(label) for label in settings.AUDIT_WATCH}
    proxies = {
        model for model in apps.get_models() if model._meta.proxy and model._meta.concrete_model in watched
    }
    for model in watched | proxies:
        signals.pre_save.connect(
            before_save, sender=model, dispatch_uid=f"audit-before-save-{model._meta.label}"
        )
        signals.post_save.connect(
            after_save, sender=model, dispatch_uid=f"audit-after-save-{model._meta.label}"
        )
        signals.pre_delete.connect(
            before_delete, sender=model, dispatch_uid=f"audit-delete-{model._meta.label}"
        )
    for model in watched:
        for relation in model._meta.many_to_many:
            through = relation.remote_field.through
            signals.m2m_changed.connect(
                members_changed,
                sender=through,
                dispatch_uid=f"audit-members-{model._meta.label}-{relation.name}",
            )


def before_save(sender: type[models.Model], instance: models.Model, **kwargs: Any) -> None:
    """Remember the row as the database has it, under the lock of the head."""
    if _signs_in(kwargs.get("update_fields")):
        return
    instance._audit_block = own_block()  # type: ignore[attr-defined]
    current()
    # A row of a fixture (`raw`) always says that it is new, also where it replaces one.
    new = instance._state.adding and not kwargs.get("raw")
    stored = None if new else sender._base_manager.filter(pk=instance.pk).first()
    instance._audit_before = {} if stored is None else state_of(stored)  # type: ignore[attr-defined]


def after_save(sender: type[models.Model], instance: models.Model, created: bool, **kwargs: Any) -> None:
    if _signs_in(kwargs.get("update_fields")):
        return
    before = instance.__dict__.pop("_audit_before", {})
    with instance.__dict__.pop("_audit_block"):
        difference_made = difference(before, state_of(instance))
        if created or difference_made:
            verb = "add" if created else "update"
            current().add(verb=verb, identity=identity_of(instance), changes=difference_made)


def before_delete(sender: type[models.Model], instance: models.Model, **kwargs: Any) -> None:
    current().add(verb="delete", identity=identity_of(instance), changes=difference(state_of(instance), {}))


def members_changed(
    sender: type[models.Model],
    instance: models.Model,
    action: str,
    reverse: bool,
    model: type[models.Model],
    pk_set: set[Any] | None,
    **kwargs: Any,
) -> None:
    """A many-to-many change, told as an update of the row it was made through."""
    if action not in {"post_add", "post_remove", "pre_clear"}:
        return
    name = model._meta.verbose_name_plural or ""
    members = sorted(str(pk) for pk in pk_set or ())
    if action == "pre_clear":
        changed: list[Any] = [["all"], []]
    else:
        changed = [[], members] if action == "post_add" else [members, []]
    if changed[0] or changed[1]:
        current().add(verb="update", identity=identity_of(instance), changes={str(name): changed})


def _signs_in(update_fields: frozenset[str] | None) -> bool:
    return bool(update_fields) and frozenset(update_fields or ()) <= BY_SIGNING_IN
