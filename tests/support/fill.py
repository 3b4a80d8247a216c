"""Run inside Django by `tests.support.gateway`: fills an installation's database through the functions that people use."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from django.conf import settings

from audit.changes import changes
from providers import crypto, keyring
from providers.active import Target, set_active
from providers.keys import write_default
from providers.models import ActiveProvider, Keyring, Provider, UpstreamModel
from proxy.keys import give_secret
from proxy.models import GatewayKey


def wrap_lightly() -> None:
    """Wrap the stored keyring anew under its key, with one round."""
    wrap = crypto.wrap(keyring.current(), settings.PENSTOCK_ENCRYPTION_KEY, rounds=1)
    Keyring.objects.update(wraps=[dataclasses.asdict(wrap)])


def provide(text: str) -> None:
    """What `Gateway.provide` describes, given as JSON; prints `{"key": ..., "provider": id}`."""
    given = json.loads(text)
    with changes(actor=None, via="command"):
        provider = _provider(given)
        if given["active"]:
            _activate(given["active"], provider)
        issued = _issue(given["limits"]) if given["key"] else ""
    print(json.dumps({"key": issued, "provider": provider.pk}))


def _provider(given: dict[str, Any]) -> Provider:
    provider = Provider(**given["provider"])
    provider.full_clean()
    provider.save()
    for name in given["models"]:
        UpstreamModel.objects.create(provider=provider, name=name, purposes=given["purposes"])
    if given["api_key"]:
        write_default(provider, given["api_key"])
    return provider


def _activate(purpose: str, provider: Provider) -> None:
    """The first provider becomes the active one, a later one a fallback behind those that are there."""
    active = ActiveProvider.objects.filter(purpose=purpose).first()
    before = active.targets.select_related("provider", "api_key").order_by("position") if active else ()
    targets = [Target(target.provider, target.api_key, target.model) for target in before]
    set_active(purpose, [*targets, Target(provider)])


def _issue(limits: dict[str, Any]) -> str:
    key = GatewayKey(name=f"test {GatewayKey.objects.count() + 1}", **limits)
    whole = give_secret(key)
    key.save()
    return whole
