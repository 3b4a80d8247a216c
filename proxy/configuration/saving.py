"""How an entry of each section becomes a row. Whatever a form or the API would refuse is refused here, by the same models."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError

from providers import keys, transfer
from providers.active import Target, set_active
from providers.adapters import KINDS
from providers.models import ApiKey, Provider, Purpose
from proxy.configuration import values
from proxy.models import ModelPrice, RouteNode
from proxy.routes import DEFAULTS as NODE
from proxy.routes import set_nodes

HMAC = re.compile(r"[0-9a-f]{64}")
KEY_ID = re.compile(r"[0-9A-Za-z]{10}")
LEADS_ELSEWHERE = "Now leads to another scheme, host or port. Every key that is stored for it must come along in the same file."


class LeftOut(Exception):
    """An entry that is skipped, which is no error; the message says why."""


@dataclass(slots=True)
class Run:
    """One restore. `named` has the rows of each section that the document names; `notes` are told to whoever restores.

    moved: providers whose address changed, with the place of their entry; entered: keys whose secret came along.
    """

    opener: transfer.Opener
    author: str = ""
    managed_by: str | None = None
    named: dict[str, set[Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    moved: dict[int, str] = field(default_factory=dict)
    entered: set[int] = field(default_factory=set)
    said_enabled: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Draft:
    """A row with the columns of its entry in it, not saved yet. `before` is what those columns were."""

    row: Any
    entry: Mapping[str, Any]
    before: dict[str, Any]
    place: str
    run: Run

    @property
    def new(self) -> bool:
        return self.row.pk is None

    @property
    def changed(self) -> bool:
        return any(getattr(self.row, name) != value for name, value in self.before.items())

    def check_and_save(self, *, always: bool = False) -> bool:
        """Check and save the row where that changes something; whether it did."""
        if not (always or self.new or self.changed):
            return False
        self.row.full_clean()
        # Checking tidies up: an address with a slash at its end may be the one that is stored.
        if not (always or self.new or self.changed):
            return False
        if self.new and hasattr(self.row, "created_by"):
            self.row.created_by = self.run.author
        self.row.save()
        return True


def save(draft: Draft) -> None:
    draft.check_and_save()


def save_user(draft: Draft) -> None:
    """Owners that are missing are made, without a password and without a role; those that are there stay as they are."""
    if draft.new:
        draft.row.set_unusable_password()
        draft.row.full_clean()
        draft.row.save()


def never_held(price: Mapping[str, Any]) -> str:
    """Why an entry is passed over: another price of the same beginning took its place before it began."""
    until = price.get("effective_until")
    return (
        "never held, so it is left out" if until is not None and until == price.get("effective_from") else ""
    )


def save_price(draft: Draft) -> None:
    """An override of a provider's price. What was billed by stays what it was; only its end may come."""
    price = draft.row
    changed = {name for name, value in draft.before.items() if getattr(price, name) != value}
    if not draft.new and changed - {"effective_until"}:
        raise ValidationError("A price never changes. Write a new one, with another effective_from.")
    provider = Provider.objects.filter(slug=price.provider).first()
    if provider is None:
        raise ValidationError({"provider": ["There is no such provider."]})
    price.source, price.provider_id = ModelPrice.Source.OVERRIDE, provider.pk
    draft.check_and_save()


def save_provider(draft: Draft) -> None:
    provider, run = draft.row, draft.run
    if draft.new and not provider.base_url:
        kind = KINDS.get(provider.kind)
        if kind is None or kind.self_hosted:
            raise ValidationError({"base_url": ["This field is required."]})
        provider.base_url = kind.base_url.rstrip("/")
    stored = Provider.objects.get(pk=provider.pk) if not draft.new and "base_url" in draft.before else None
    draft.check_and_save()
    if stored is not None and stored.base_url != provider.base_url and _moves(stored, provider.base_url):
        run.moved[provider.pk] = draft.place
    if "enabled" in draft.entry:
        run.said_enabled.add(provider.pk)


def _moves(stored: Provider, base_url: str) -> bool:
    """Whether the stored keys would be sent elsewhere; they certainly would where the old address was none."""
    try:
        return keys.moves(stored, base_url)
    except ValueError:
        return True


# -- keys --------------------------------------------------------------------------------------------------------------


def describe_secret(key: ApiKey, *, sealed: bool) -> dict[str, Any]:
    """In a backup the sealed value; in a file for people a reference, and nothing else."""
    if sealed:
        return {"sealed": transfer.sealed_of(key)}
    reference = transfer.reference_of(key)
    return {"secret": reference} if reference else {}


def save_api_key(draft: Draft) -> None:
    key = draft.row
    if not hasattr(key, "provider"):
        raise ValidationError({"provider": ["This field is required."]})
    if not draft.new and draft.before.get("provider", key.provider) != key.provider:
        raise ValidationError({"provider": ["A key stays with its provider; add it there anew."]})
    _refuse_without_address(key.provider)
    first = draft.new and not key.provider.keys.exists()
    if first and "is_default" not in draft.entry:
        key.is_default = True
    always = _take_secret(draft)
    if key.is_default:
        _clear_default(draft)
    draft.check_and_save(always=always)
    if first and not key.provider.enabled and not key.provider.self_hosted:
        _enable(draft)


def _refuse_without_address(provider: Provider) -> None:
    """A row may have been written past the forms; nothing can be sealed for an address that is none."""
    try:
        _ = provider.origin
    except ValueError as error:
        raise ValidationError({"provider": ["The base URL of this provider is no address."]}) from error


def _take_secret(draft: Draft) -> bool:
    """Put the secret that came along into the key; whether it is another one than before."""
    key, run = draft.row, draft.run
    plain, sealed = (_text(draft, name) for name in ("secret", "sealed"))
    moved = key.provider_id in run.moved or key.uid != draft.before.get("uid", key.uid)
    if sealed and sealed == transfer.sealed_of(key) and not moved:
        run.entered.add(key.pk)
        return False
    if not plain and not sealed:
        return _without_secret(draft)
    value = _plain(plain) if plain else _opened(draft, sealed)
    run.entered.add(key.pk)
    if run.opener.holds(key, value) and not moved:
        return False
    run.opener.take_over(key, value, sealed="" if plain else sealed)
    return True


def _text(draft: Draft, name: str) -> str:
    value = draft.entry.get(name) or ""
    if not isinstance(value, str):
        raise ValidationError({name: ["Write text, in quotes."]})
    return value


def _plain(text: str) -> Any:
    try:
        keys.check_value(text)
    except ValidationError as error:
        raise ValidationError({"secret": error.messages}) from error
    return transfer.as_secret(text)


def _opened(draft: Draft, sealed: str) -> Any:
    try:
        return draft.run.opener.open(draft.row, sealed)
    except transfer.CannotOpen as error:
        raise ValidationError({"sealed": [str(error)]}) from error


def _without_secret(draft: Draft) -> bool:
    key = draft.row
    if draft.new:
        raise LeftOut("has no secret in this document, so it is not made")
    # What is stored is sealed for the uid that the key has here.
    key.uid = draft.before.get("uid", key.uid)
    return False


def _clear_default(draft: Draft) -> None:
    key, run = draft.row, draft.run
    for other in key.provider.keys.filter(is_default=True).exclude(pk=key.pk):
        if other.pk in run.named.get("api_keys", ()):
            raise ValidationError(
                {"is_default": ["Another key of this provider in the document is its default."]}
            )
    keys.clear_default(key.provider, but=key)


def _enable(draft: Draft) -> None:
    """A vendor's first key switches it on, unless the document says otherwise."""
    provider = draft.row.provider
    if provider.pk not in draft.run.said_enabled:
        provider.enabled = True
        provider.save()


def save_gateway_key(draft: Draft) -> None:
    key = draft.row
    if draft.new and not key.hmac:
        raise LeftOut("has no secret in this document, so it is not made; issue it here")
    problems = dict(_wrong_digests(key, draft.entry))
    if draft.new and not KEY_ID.fullmatch(key.key_id):
        problems["key_id"] = ["Write the ten letters and digits after pen_live_."]
    if problems:
        raise ValidationError(problems)
    if draft.before.get("revoked_at") is not None and key.revoked_at != draft.before["revoked_at"]:
        key.revoked_at = draft.before["revoked_at"]
        draft.run.notes.append(f"gateway key {key.name} was revoked here, and stays so")
    if key.revoked_at is not None:
        key.enabled = False
    emptied = draft.before.get("cache_emptied_at")
    if emptied is not None and (key.cache_emptied_at is None or key.cache_emptied_at < emptied):
        # What a cache held before it was emptied is not given again, whatever a backup from then says.
        key.cache_emptied_at = emptied
    draft.check_and_save()


def _wrong_digests(key: Any, entry: Mapping[str, Any]) -> Iterable[tuple[str, list[str]]]:
    for name, pepper, needed in (("hmac", "pepper", True), ("previous_hmac", "previous_pepper", False)):
        if name not in entry or (not needed and not entry[name]):
            continue
        if not HMAC.fullmatch(entry[name]):
            yield name, ["Write the 64 digits of an HMAC."]
        if getattr(key, pepper) not in settings.PENSTOCK_PEPPERS:
            yield pepper, ["PENSTOCK_PEPPERS has no pepper of this number, so the key would not be accepted."]


def save_model(draft: Draft) -> None:
    model = draft.row
    known = set(Purpose.values)
    if not isinstance(model.purposes, list) or not all(
        isinstance(each, str) and each in known for each in model.purposes
    ):
        raise ValidationError({"purposes": [f"Write a list of {', '.join(sorted(known))}."]})
    names = model.capabilities
    if not isinstance(names, list) or not all(
        isinstance(each, str) and 0 < len(each) <= 64 for each in names
    ):
        raise ValidationError({"capabilities": ["Write a list of words like tools or vision."]})
    draft.check_and_save()


# -- lists of parts ----------------------------------------------------------------------------------------------------


def save_active(draft: Draft) -> None:
    """All targets at once, as through the API; nothing is saved where nothing changes."""
    active, run = draft.row, draft.run
    if draft.new:
        active.full_clean(exclude=["managed_by"])
    else:
        draft.check_and_save()
    if "targets" not in draft.entry and not draft.new:
        return
    targets = [
        _target(part, f"targets.{i}") for i, part in enumerate(parts(draft.entry.get("targets"), "targets"))
    ]
    stored = () if draft.new else active.targets.all()
    if targets and [Target(row.provider, row.api_key, row.model) for row in stored] == targets:
        return
    made = set_active(active.purpose, targets, created_by=run.author)
    if draft.new:
        made.managed_by = active.managed_by
        if made.managed_by:
            made.save()
        draft.row = made


def _target(part: Mapping[str, Any], place: str) -> Target:
    refuse_unknown(part, ("provider", "api_key", "model"), place)
    provider = _named_provider(part.get("provider"), place)
    key = None
    if (name := part.get("api_key")) is not None:
        key = provider.keys.filter(name=name).first() if isinstance(name, str) else None
        if key is None:
            raise ValidationError({f"{place}.api_key": ["There is no such key of this provider."]})
    model = part.get("model") or ""
    if not isinstance(model, str) or len(model) > 255:
        raise ValidationError({f"{place}.model": ["Write the name of a model."]})
    return Target(provider, key, model)


def save_route(draft: Draft) -> None:
    """The version is the route's and its nodes' together."""
    route, new = draft.row, draft.new
    saved = draft.check_and_save()
    if "nodes" not in draft.entry:
        return
    nodes = [_node(part, f"nodes.{i}") for i, part in enumerate(parts(draft.entry["nodes"], "nodes"))]
    if set_nodes(route, nodes) and not saved and not new:
        route.save()


def _node(part: Mapping[str, Any], place: str) -> dict[str, Any]:
    refuse_unknown(part, ("provider", *NODE), place)
    columns: dict[str, Any] = {"provider": _named_provider(part.get("provider"), place)}
    for name in NODE:
        if name in part:
            try:
                columns[name] = values.accepted(RouteNode, name, part[name])
            except ValidationError as error:
                raise ValidationError({f"{place}.{name}": error.messages}) from error
    return columns


def _named_provider(slug: Any, place: str) -> Provider:
    found = Provider.objects.filter(slug=slug).first() if isinstance(slug, str) else None
    if found is None:
        raise ValidationError({f"{place}.provider": ["There is no such provider."]})
    return found


def parts(value: Any, name: str) -> list[Mapping[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise ValidationError({name: ["Write a list of objects."]})
    return value


def refuse_unknown(part: Mapping[str, Any], known: tuple[str, ...], place: str = "") -> None:
    if unknown := [name for name in part if name not in known]:
        prefix = f"{place}." if place else ""
        raise ValidationError({f"{prefix}{name[:100]}": ["There is no such field."] for name in unknown[:20]})
