"""What a new installation starts with: an administrator, a gateway key, the built-in echo provider, a table of prices."""

from __future__ import annotations

import json
import secrets
from argparse import ArgumentParser
from typing import Any

from django.conf import settings
from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError

from audit.changes import changes
from audit.models import Entry
from config.env import refuse_wrong_settings
from providers import keys as provider_keys
from providers.adapters import KINDS
from providers.models import ApiKey, Provider, UpstreamModel
from proxy import keys, prices
from proxy.models import GatewayKey

ECHO = "echo"
FIRST_KEY = "first key"


class Command(BaseCommand):
    help = (
        "Makes what is missing for a first start; running it again changes nothing. Secrets are printed once."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--json", action="store_true", help="print one line of JSON instead of sentences")

    def handle(self, *args: Any, **options: Any) -> None:
        refuse_wrong_settings(list(settings.SETTINGS_PROBLEMS))
        try:
            result = prepare()
        except ValidationError as error:
            raise CommandError(" ".join(error.messages)) from None
        # A list that cannot be used is no reason not to start; it is logged and shown on the start page.
        prices.refresh_if_new(via="system")
        if options["json"]:
            self.stdout.write(json.dumps(result))
            return
        for name in ("username", "password", "gateway_key"):
            if result[name]:
                self.stdout.write(f"{name}: {result[name]}")
        self.stdout.write("made: " + (", ".join(result["created"]) or "nothing, all was there"))


def prepare() -> dict[str, Any]:
    """Make what is missing, as one recorded change: {"username", "password", "gateway_key", "created": [names]}.

    password and gateway_key are None unless they were made now and nobody knows them yet. Raises ValidationError with
    the name of the setting that is wrong; then nothing was made.
    """
    created: list[str] = []
    with changes(actor=None, via="system"):
        username, password = administrator(created)
        gateway_key = first_gateway_key(created)
        echo_provider(created)
        openrouter_key(created)
    return {"username": username, "password": password, "gateway_key": gateway_key, "created": created}


def administrator(created: list[str]) -> tuple[str, str | None]:
    """The administrator's name; the password only if it was made at random now."""
    present = User.objects.filter(is_superuser=True, is_active=True).order_by("pk").first()
    if present is not None:
        return present.get_username(), None
    name = settings.DJANGO_SUPERUSER_USERNAME or "admin"
    if User.objects.filter(username=name).exists():
        raise ValidationError(
            f"DJANGO_SUPERUSER_USERNAME: {name} exists and is no active superuser; choose another name"
        )
    password = settings.DJANGO_SUPERUSER_PASSWORD or secrets.token_urlsafe(15)
    User.objects.create_superuser(name, settings.DJANGO_SUPERUSER_EMAIL, password)
    created.append("administrator")
    return name, None if settings.DJANGO_SUPERUSER_PASSWORD else password


def first_gateway_key(created: list[str]) -> str | None:
    """The whole key if one was made now and is not known from the environment."""
    chosen = settings.PENSTOCK_GATEWAY_KEY
    if chosen and keys.parse(chosen) is None:
        raise ValidationError("PENSTOCK_GATEWAY_KEY: is not a well-formed gateway key (see docs/settings.md)")
    if GatewayKey.objects.exists():
        return None
    key = GatewayKey(name=FIRST_KEY)
    if chosen:
        keys.adopt(key, chosen)
        whole = None
    else:
        whole = keys.give_secret(key)
    key.save()
    created.append("gateway key")
    return whole


def echo_provider(created: list[str]) -> None:
    """The provider that answers inside this process; the audit log knows whether somebody has deleted it."""
    if Provider.objects.filter(slug=ECHO).exists() or was_made(entity_type="provider", changes__slug__1=ECHO):
        return
    kind = KINDS[ECHO]
    provider = Provider.objects.create(slug=ECHO, name=kind.label, kind=ECHO, base_url=kind.base_url)
    UpstreamModel.objects.create(provider=provider, name=ECHO, purposes=["chat"])
    created.append("echo provider")


def openrouter_key(created: list[str]) -> None:
    """OPENROUTER_API_KEY becomes the vendor's default key, once."""
    value = settings.OPENROUTER_API_KEY
    vendor = Provider.objects.filter(slug="openrouter").first()
    if not value or vendor is None or vendor.keys.exists():
        return
    if was_made(entity_type="api_key", changes__provider__1=vendor.pk):
        return
    try:
        provider_keys.add(ApiKey(provider=vendor, name=provider_keys.DEFAULT_NAME), value)
    except ValidationError as error:
        raise ValidationError(f"OPENROUTER_API_KEY: {' '.join(error.messages)}") from error
    created.append("OpenRouter key")


def was_made(**conditions: Any) -> bool:
    return Entry.objects.filter(action__startswith="add_", **conditions).exists()
