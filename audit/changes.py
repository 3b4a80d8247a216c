"""The one door for changes of configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.db import DatabaseError, models, transaction
from django.utils import timezone

from audit import chain
from audit.addresses import peer_address
from audit.diff import difference
from audit.models import Entry, Head
from audit.request_ids import REQUEST_ID

Via = Literal["admin", "api", "task", "command", "system", "restore"]


class NotInChanges(RuntimeError):
    """Something tried to change configuration without `with audit.changes.changes(...)`."""


class AuditUnavailable(Exception):
    """The change was undone because it could not be recorded (R50)."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What an entry is about. Rows that describe one thing together share an identity and so become one entry."""

    entity_type: str
    entity_id: str
    entity_name: str
    noun: str
    verb: str = ""
    prefix: str = ""


@dataclass(slots=True)
class Change:
    """The changes of one block: who, how, and the entries so far."""

    user_id: int | None
    username: str
    via: Via
    ip: str | None
    request_id: str
    head: Head
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)

    def add(self, *, verb: str, identity: Identity, changes: dict[str, list[Any]]) -> None:
        """Note that a thing was added, updated or deleted; a second note about the same thing joins the first."""
        changes = {f"{identity.prefix}{name}": chain.storable(pair) for name, pair in changes.items()}
        key = (identity.entity_type, identity.entity_id)
        entry = self.entries.get(key)
        if entry is None:
            self.entries[key] = self._entry(f"{identity.verb or verb}_{identity.noun}", identity, changes)
            return
        if verb == "delete" and not identity.verb:
            entry.action = f"delete_{identity.noun}"
        for name, (before, after) in changes.items():
            entry.changes[name] = [entry.changes.get(name, [before])[0], after]

    def _entry(self, action: str, identity: Identity, changes: dict[str, list[Any]]) -> Entry:
        return Entry(
            timestamp=timezone.now(),
            action=action,
            entity_type=identity.entity_type,
            entity_id=identity.entity_id,
            entity_name=identity.entity_name[:255],
            user_id=self.user_id,
            username=self.username,
            via=self.via,
            ip=self.ip,
            request_id=self.request_id[:128],
            changes=changes,
        )

    def write(self) -> None:
        """Append the entries to the chain and move the head; within the block's transaction."""
        if not self.entries:
            return
        for entry in self.entries.values():
            self.head.seq += 1
            entry.seq = self.head.seq
            entry.hash = self.head.hash = chain.link(self.head.hash, entry)
        Entry.objects.bulk_create(self.entries.values())
        self.head.save(update_fields=["seq", "hash"])


_current: ContextVar[Change | None] = ContextVar("audit_change", default=None)
_each: ContextVar[Via | None] = ContextVar("audit_each_save", default=None)


def current() -> Change:
    """The open block; NotInChanges when there is none."""
    change = _current.get()
    if change is None:
        raise NotInChanges("configuration is changed only inside audit.changes.changes(...)")
    return change


@contextmanager
def changes(
    *,
    actor: AbstractBaseUser | AnonymousUser | None,
    via: Via,
    ip: str | None = None,
    request_id: str = "",
) -> Iterator[Change]:
    """A transaction whose changes of watched rows are recorded in it, or not made at all.

    The head is locked before anything else, so that writers queue, versions can be checked and no two edits deadlock.
    Blocks nest: an inner one joins the outer. No network and no name look-up may happen inside. Raises AuditUnavailable,
    with everything undone, when the entries cannot be written.
    """
    outer = _current.get()
    if outer is not None:
        yield outer
        return
    with transaction.atomic():
        change = Change(
            user_id=actor.pk if actor else None,
            username=actor.get_username() if actor else "",
            via=via,
            ip=_in_one_form(ip),
            request_id=request_id or REQUEST_ID.get(),
            head=_locked_head(),
        )
        token = _current.set(change)
        try:
            yield change
        finally:
            _current.reset(token)
        try:
            change.write()
        except DatabaseError as error:
            raise AuditUnavailable("the audit log cannot be written, so nothing was changed") from error


@contextmanager
def each_save(*, via: Via) -> Iterator[None]:
    """Within this block every save of a watched row outside `changes()` is a block of its own.

    For commands that ask a person something before they save: the head must not stay locked meanwhile.
    """
    token = _each.set(via)
    try:
        yield
    finally:
        _each.reset(token)


def own_block() -> ExitStack:
    """The block of one save under `each_save`, to be closed after it; empty when there is nothing to open."""
    stack = ExitStack()
    via = _each.get()
    if _current.get() is None and via is not None:
        stack.enter_context(changes(actor=None, via=via))
    return stack


def _locked_head() -> Head:
    head = Head.objects.select_for_update().filter(pk=1).first()
    if head is None:
        Head.objects.get_or_create(pk=1)
        head = Head.objects.select_for_update().get(pk=1)
    return head


def identity_of(row: models.Model) -> Identity:
    """A row's own word (`audit_identity()`), else its model's name, key and text."""
    own = getattr(row, "audit_identity", None)
    if own is not None:
        identity: Identity = own()
        return identity
    name = row._meta.model_name or ""
    return Identity(entity_type=name, entity_id=str(row.pk), entity_name=str(row), noun=name)


def record(row: models.Model, *, verb: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Note a change that no signal tells of: a bulk operation, told as one entry about `row`."""
    current().add(verb=verb, identity=identity_of(row), changes=difference(before, after))


def _in_one_form(address: str | None) -> str | None:
    """An address as every database gives it back, since it is hashed; None for what is none, which a proxy may tell."""
    found = peer_address(address or "")
    return None if found is None else str(found)
