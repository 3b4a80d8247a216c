"""Choosing the provider of a purpose, and its fallbacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from django.core.exceptions import ValidationError

from providers.models import ActiveProvider, ActiveTarget, ApiKey, Provider, Purpose

MAX_TARGETS = 10


@dataclass(frozen=True, slots=True)
class Target:
    """A provider, or only one key of it, and the model to ask for (empty: the caller's, else its first)."""

    provider: Provider
    api_key: ApiKey | None = None
    model: str = ""


def set_active(purpose: str, targets: Sequence[Target], *, created_by: str = "") -> ActiveProvider:
    """Make `targets[0]` the active provider of `purpose` and the others its fallbacks, in order.

    Inside `audit.changes`. Raises ValidationError for an unknown purpose, no or too many targets, a doubled target, a
    key of another provider, or a provider that is not for this purpose.
    """
    if purpose not in Purpose.values:
        raise ValidationError({"purpose": f"Choose one of {', '.join(Purpose.values)}."})
    if not 1 <= len(targets) <= MAX_TARGETS:
        raise ValidationError({"fallbacks": f"At most {MAX_TARGETS - 1} fallbacks."})
    check_targets(purpose, targets)
    active = ActiveProvider.objects.filter(purpose=purpose).first()
    if active is None:
        active = ActiveProvider(purpose=purpose, created_by=created_by)
    active.save()
    stored = {target.position: target for target in active.targets.all()}
    for position, target in enumerate(targets):
        row = stored.pop(position, None) or ActiveTarget(active=active, position=position)
        row.provider, row.api_key, row.model = target.provider, target.api_key, target.model
        row.save()
    for row in stored.values():
        row.delete()
    return active


def check_targets(purpose: str, targets: Sequence[Target]) -> None:
    seen = set()
    for target in targets:
        if target.api_key is not None and target.api_key.provider_id != target.provider.pk:
            raise ValidationError({"provider_id": "This key belongs to another provider."})
        if not getattr(target.provider, f"use_for_{purpose}"):
            raise ValidationError({"provider_id": f"{target.provider.name} is not marked for {purpose}."})
        mark = (target.provider.pk, target.api_key.pk if target.api_key else None, target.model)
        if mark in seen:
            raise ValidationError({"fallbacks": f"{target.provider.name} stands there twice."})
        seen.add(mark)


def clear_active(purpose: str) -> bool:
    """Leave `purpose` without a provider; whether it had one. Inside `audit.changes`."""
    active = ActiveProvider.objects.filter(purpose=purpose).first()
    if active is None:
        return False
    active.delete()
    return True
