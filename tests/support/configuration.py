"""A small installation to write down and restore, used by the tests of documents, backups, commands and pages."""

from __future__ import annotations

import json
from typing import Any

import pytest
from django.contrib.auth.models import User

from audit.changes import changes
from audit.models import Head
from providers import keys
from providers.active import Target, set_active
from providers.models import ActiveProvider, ApiKey, Provider, UpstreamModel
from proxy import keys as gateway_keys
from proxy.configuration import foreign, reading
from proxy.configuration.restoring import Outcome, Refused, restore
from proxy.models import GatewayKey, ModelRoute
from proxy.routes import set_nodes

CANARY = "sk-canary-0123456789abcdef"
BOX = "http://127.0.0.1:9101/v1"


def source(content: Any) -> foreign.Source:
    """A document as it comes from a file of JSON."""
    return foreign.source_of(reading.read(json.dumps(content).encode()))


def restored(content: Any, **options: Any) -> Outcome:
    return restore(source(content), actor=None, **options)


def refused(content: Any, **options: Any) -> list[str]:
    """What is wrong with a document; nothing may have been changed by it."""
    before = Head.objects.get().seq
    with pytest.raises(Refused) as caught:
        restored(content, **options)
    assert Head.objects.get().seq == before
    return [str(problem) for problem in caught.value.problems]


def empty() -> None:
    """A database without configuration; its keyring and its audit log stay."""
    with changes(actor=None, via="system"):
        for model in (ActiveProvider, ModelRoute, GatewayKey, Provider):
            for row in model.objects.all():
                row.delete()


def fill(owner: User) -> str:
    with changes(actor=None, via="system"):
        box = Provider.objects.create(slug="box", name="Box", kind="vllm", base_url=BOX, metadata={"rack": 7})
        openai = Provider.objects.get(slug="openai")
        team = ApiKey(provider=openai, name="team", weight=3)
        keys.add(team, CANARY)
        keys.add(ApiKey(provider=openai, name="spare"), "env://OPENAI_SPARE")
        UpstreamModel.objects.create(provider=box, name="tiny", purposes=["chat"], context_window=4096)
        UpstreamModel.objects.create(provider=openai, name="gpt-4o", source="discovered")
        set_active("chat", [Target(openai, team, "gpt-4o"), Target(box)])
        route = ModelRoute.objects.create(name="fast", strategy="weighted", config={"note": "x"})
        set_nodes(route, [{"provider": box, "weight": 2, "models": ["tiny"]}, {"provider": openai}])
        key = GatewayKey(name="chatbot", owner=owner, allowed_models=["fast"], requests_per_minute=9)
        whole = gateway_keys.give_secret(key)
        key.save()
    return whole
