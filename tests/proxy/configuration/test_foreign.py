"""Files of other systems: providers.yaml, api_keys.csv and config_backup.json, by the same command and with the same care."""

from __future__ import annotations

import json
from typing import Any

import pytest

from audit.models import Entry, Head
from providers import keys
from providers.models import ApiKey, Provider
from proxy.configuration import foreign, reading
from proxy.configuration.restoring import Outcome, Refused, restore
from proxy.models import ModelRoute
from tests.support.configuration import CANARY

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("ring")]

PROVIDERS = """providers:
  - name: Box
    slug: box
    kind: vllm
    base_url: http://127.0.0.1:9101/v1
    models: [tiny, small]
    api_key: sk-canary-0123456789abcdef
  - name: OpenAI
    kind: openai
    api_key_ref: env://OPENAI_API_KEY
    enabled: true
"""
BACKUP: dict[str, Any] = {
    "providers": [
        {
            "id": 7,
            "name": "Example Provider",
            "base_url": "https://api.example.com/v1",
            "api_key": CANARY,
            "models": ["example-model-1", "example-model-2"],
            "is_active": True,
            "status": "online",
            "latency_ms": 45.2,
            "last_tested_at": "2024-01-15T10:30:00+00:00",
            "consecutive_failures": 0,
            "is_healthy": True,
            "created_at": "2024-01-10T08:00:00+00:00",
            "updated_at": "2024-01-15T10:30:00+00:00",
        }
    ],
    "model_routes": [
        {
            "id": 1,
            "name": "llm-auto-route",
            "mode": "auto",
            "is_active": True,
            "config": {},
            "nodes": [
                {"id": 3, "api_id": 7, "models": [], "strategy": "round-robin", "priority": 0, "metadata": {}}
            ],
        }
    ],
}


def take(text: str) -> Outcome:
    return restore(foreign.source_of(reading.read(text.encode())), actor=None)


def wrong(text: str) -> list[str]:
    head = Head.objects.get().seq
    with pytest.raises(Refused) as caught:
        take(text)
    assert Head.objects.get().seq == head
    assert CANARY not in str(caught.value) + " ".join(map(str, caught.value.problems))
    return [str(problem) for problem in caught.value.problems]


def opened(provider: str) -> str:
    return keys.opened(ApiKey.objects.select_related("provider").get(provider__slug=provider)).reveal()


def test_providers_yaml_brings_providers_models_and_keys() -> None:
    take(PROVIDERS)

    box = Provider.objects.get(slug="box")
    assert [model.name for model in box.upstream_models.all()] == ["small", "tiny"]
    assert opened("box") == CANARY and opened("openai") == "env://OPENAI_API_KEY"
    assert Provider.objects.get(slug="openai").enabled and Provider.objects.filter(kind="openai").count() == 1
    assert CANARY not in json.dumps(list(Entry.objects.values_list("changes", flat=True)))


def test_each_of_them_taken_twice_changes_nothing() -> None:
    for text in (
        PROVIDERS,
        json.dumps(BACKUP),
        f"provider,key_name,api_key,weight,enabled\ngroq,a,{CANARY},2,true\n",
    ):
        assert take(text).changes
        assert take(text).changes == ()


def test_a_table_of_keys_seals_each_and_enables_their_vendors() -> None:
    take(
        "\ufeffprovider,key_name,api_key,weight,enabled\r\n"
        f"openai,team,{CANARY},3,true\r\n"
        "\r\n"
        'groq,"with, comma",gsk-0123456789ab,,\r\n'
        "openai,off,sk-0123456789ab,1,no\r\n"
    )

    team = ApiKey.objects.get(name="team")
    assert (team.weight, team.enabled, team.is_default) == (3, True, True)
    assert not ApiKey.objects.get(name="off").enabled
    assert (
        keys.opened(ApiKey.objects.select_related("provider").get(name="with, comma")).reveal()
        == "gsk-0123456789ab"
    )
    assert set(
        Provider.objects.filter(enabled=True, slug__in=["openai", "groq"]).values_list("slug", flat=True)
    ) == {
        "openai",
        "groq",
    }


def test_one_bad_row_of_a_table_means_none_is_taken_and_all_are_listed() -> None:
    said = wrong(
        "provider,key_name,api_key,weight,enabled\n"
        f"openai,good,{CANARY},1,true\n"
        f"nobody,a,{CANARY},1,true\n"
        f"openai,,{CANARY},x,perhaps\n"
        f"openai,b,{CANARY}\n"
        "openai,c,sk with spaces,1,true\n"
        f"openai,good,{CANARY},0,true\n"
        "openai,d,****cdef,0,true\n"
    )

    assert [line.partition(":")[0] for line in said] == [
        "line 4, key_name",
        "line 4, weight",
        "line 4, enabled",
        "line 5",
        "line 3, provider",
        "line 4, key_name",
        "line 6, api_key",
        "line 7",
        "line 8, api_key",
    ]
    assert not ApiKey.objects.exists()


def test_bad_rows_of_providers_yaml_are_listed_with_their_lines() -> None:
    said = wrong(
        "providers:\n"
        "  - name: Good\n    base_url: http://127.0.0.1:9\n"
        "  - base_url: http://127.0.0.1:9\n"
        "  - name: Far\n    kind: openai\n    base_url: http://169.254.169.254/\n"
        "  - {name: Both, base_url: 'http://127.0.0.1:9', api_key: sk-0123456789, api_key_ref: env://X}\n"
        "  - {name: Bare, base_url: 'http://127.0.0.1:9', api_key_ref: JUST_A_NAME}\n"
        "  - {name: Odd, base_url: 'http://127.0.0.1:9', models: tiny, colour: red}\n"
        "  - {name: Later, base_url: 'http://127.0.0.1:9', api_key_ref: 'vault://a/b#c'}\n"
        "  - just words\n"
    )

    assert {line.partition(":")[0] for line in said} == {
        "line 4, name",
        "line 5, base_url",
        "line 8, api_key_ref",
        "line 9, api_key_ref",
        "line 10, models",
        "line 10, colour",
        "line 11, api_key",
        "line 12",
    }
    assert not Provider.objects.filter(name="Good").exists()


def test_a_backup_of_another_system_brings_its_routes_too() -> None:
    take(json.dumps(BACKUP, indent=2))

    provider = Provider.objects.get(slug="example-provider")
    assert (provider.kind, provider.enabled, opened("example-provider")) == (
        "openai-compatible",
        True,
        CANARY,
    )
    route = ModelRoute.objects.get(name="llm-auto-route")
    assert [(node.provider, node.strategy) for node in route.nodes.all()] == [(provider, "round-robin")]


def test_a_key_that_the_other_system_encrypted_is_left_out_with_a_word() -> None:
    providers = [
        {**BACKUP["providers"][0], "api_key": "gAAAAABl" + "x" * 100},
        {"name": "B", "base_url": "http://127.0.0.1:9", "encrypted_api_key": "abc"},
    ]

    outcome = take(json.dumps({"providers": providers}))

    assert len(outcome.notes) == 2 and all("encrypted by the other system" in note for note in outcome.notes)
    assert Provider.objects.filter(name="B").exists() and not ApiKey.objects.exists()


def test_a_route_to_a_provider_that_is_not_in_the_file_is_refused() -> None:
    text = json.dumps({"model_routes": [{"name": "r", "nodes": [{"api_id": 9}]}]}, indent=1)
    said = wrong(text)
    assert said[0].startswith("line 3, nodes.0.api_id")
