"""F40: two people edit the same row. No edit is lost, and what the gateway itself writes is in nobody's way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import transaction
from django.utils import timezone
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from providers.health import record
from providers.models import ApiKey, KeyUse, Provider
from providers.wire import Reading
from tests.support.api import V1, add_key, add_server, as_

pytestmark = pytest.mark.django_db
FIELDS = ("priority", "connect_timeout_seconds")
STEP = st.one_of(
    st.tuples(st.just("read"), st.sampled_from("ab"), st.none()),
    st.tuples(
        st.just("write"),
        st.sampled_from("ab"),
        st.tuples(st.sampled_from(FIELDS), st.integers(min_value=1, max_value=9)),
    ),
    st.tuples(st.just("probe"), st.none(), st.sampled_from(["online", "timeout"])),
)


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(steps=st.lists(STEP, min_size=2, max_size=12))
def test_f40_of_two_writers_none_loses_an_edit_and_probes_disturb_neither(
    steps: list[Any], owner: User
) -> None:
    client = as_(owner)
    with transaction.atomic():
        path = f"{V1}/servers/{add_server(client)['id']}"
        play(client, path, steps)
        transaction.set_rollback(True)


def play(client: Any, path: str, steps: list[Any]) -> None:
    """Each writer reads, edits what he has read and sends it back with its ETag, as a form does. The model beside it is a dict."""
    first = client.get(path)
    stored = {name: first.json()[name] for name in FIELDS}
    version = first["ETag"]
    seen = dict.fromkeys("ab", first)
    for kind, who, what in steps:
        if kind == "read":
            seen[who] = client.get(path)
            assert seen[who]["ETag"] == version
        elif kind == "probe":
            record(int(path.rpartition("/")[2]), Reading(what, None, "", 1.0), now=timezone.now())
        else:
            name, value = what
            basis = seen[who]
            answer = client.put(path, {**basis.json(), name: value}, headers={"If-Match": basis["ETag"]})
            if basis["ETag"] == version:
                assert answer.status_code == 200, answer.content
                changed = stored[name] != value
                stored[name] = value
                assert (answer["ETag"] != version) is changed
                version, seen[who] = answer["ETag"], answer
            else:
                assert answer.status_code == 412
        now = client.get(path)
        assert ({name: now.json()[name] for name in FIELDS}, now["ETag"]) == (stored, version)


def test_f40_counters_of_a_key_neither_conflict_nor_are_overwritten(owner: User) -> None:
    client = as_(owner)
    path = f"{V1}/api-keys/{add_key(client)['id']}"
    seen = client.get(path)
    KeyUse.objects.update_or_create(
        api_key=ApiKey.objects.get(), defaults={"requests_count": 7, "tokens_used": 5}
    )

    answer = client.put(path, {**seen.json(), "weight": 3}, headers={"If-Match": seen["ETag"]})

    assert answer.status_code == 200, answer.content
    assert (answer.json()["requests_count"], answer.json()["weight"]) == (7, 3)


@pytest.mark.parametrize("what", ["servers", "api-keys", "model-routes", "gateway-keys", "active"])
def test_every_object_has_an_etag_and_refuses_an_old_one(owner: User, what: str) -> None:
    client = as_(owner)
    server = add_server(client)["id"]
    objects: dict[str, Callable[[], tuple[str, dict[str, Any]]]] = {
        "servers": lambda: (f"servers/{server}", {"priority": 1}),
        "api-keys": lambda: (f"api-keys/{add_key(client)['id']}", {"weight": 2}),
        "model-routes": lambda: (f"model-routes/{route(client, server)}", {"strategy": "failover"}),
        "gateway-keys": lambda: (f"gateway-keys/{gateway_key(client)}", {"name": "other"}),
        "active": lambda: (active(client, server), {"model": "tiny"}),
    }
    path, change = objects[what]()
    seen = client.get(f"{V1}/{path}")["ETag"]

    first = client.patch(f"{V1}/{path}", change, headers={"If-Match": seen})
    late = client.patch(f"{V1}/{path}", change, headers={"If-Match": seen})
    deletion = client.delete(f"{V1}/{path}", headers={"If-Match": seen})

    assert first.status_code == 200, first.content
    assert (late.status_code, deletion.status_code) == (412, 412)
    assert late.json()["error"]["code"] == "PRECONDITION_FAILED"
    assert client.get(f"{V1}/{path}")["ETag"] == first["ETag"]


def route(client: Any, server: int) -> int:
    made = client.post(f"{V1}/model-routes", {"name": "r", "nodes": [{"provider_id": server}]})
    return int(made.json()["id"])


def gateway_key(client: Any) -> int:
    return int(client.post(f"{V1}/gateway-keys", {"name": "app"}).json()["id"])


def active(client: Any, server: int) -> str:
    client.put(f"{V1}/active/chat", {"provider_type": "ai_server", "provider_id": server})
    assert Provider.objects.get(pk=server).enabled
    return "active/chat"


def test_a_part_of_the_active_provider_is_changed_and_the_rest_stays(owner: User) -> None:
    client = as_(owner)
    first, second = add_server(client)["id"], add_server(client, name="second")["id"]
    body = {
        "provider_type": "ai_server",
        "provider_id": first,
        "fallbacks": [{"provider_type": "ai_server", "provider_id": second}],
    }
    client.put(f"{V1}/active/chat", body)

    changed = client.patch(f"{V1}/active/chat", {"model": "tiny"}).json()
    turned = client.patch(f"{V1}/active/chat", {"provider_id": second, "fallbacks": []}).json()

    assert (changed["provider_id"], changed["model"], len(changed["fallbacks"])) == (first, "tiny", 1)
    assert (turned["provider_id"], turned["model"], turned["fallbacks"]) == (second, None, [])
    assert client.patch(f"{V1}/active/embeddings", {"model": "x"}).status_code == 404
    assert client.patch(f"{V1}/active/chat", {"colour": "x"}).status_code == 400
    assert client.patch(f"{V1}/active/chat", []).status_code == 400
