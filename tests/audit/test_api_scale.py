"""Lists of 10,000 providers and 100,000 audit entries: how many queries a page costs, and, in long runs, how long it takes."""

from __future__ import annotations

import time
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from audit import chain
from audit.changes import changes
from audit.models import Entry, Head
from providers.models import Provider, UpstreamModel
from tests.support.api import V1, add_key, add_server, as_

pytestmark = pytest.mark.django_db
MOST_QUERIES = 12
MOST_SECONDS = 0.2
LISTS = ("providers", "servers", "api-keys", "model-routes", "gateway-keys", "audit")


def fill(client: Any, start: int, number: int) -> None:
    """So many of everything that has a list."""
    for n in range(start, start + number):
        server = add_server(client, name=f"box {n}", models=["tiny", "big"], api_key=f"sk-0123456789-{n}")[
            "id"
        ]
        add_key(client, key_name=f"key {n}")
        client.post(f"{V1}/model-routes", {"name": f"route-{n}", "nodes": [{"provider_id": server}]})
        client.post(f"{V1}/gateway-keys", {"name": f"app {n}"})


def queries(client: Any, path: str) -> int:
    with CaptureQueriesContext(
        connection,
    ) as seen:
        answer = client.get(path)
    assert answer.status_code == 200 and answer.json()["results"], answer.content
    return len(seen)


def test_a_page_costs_a_bounded_number_of_queries_however_long_it_is(owner: User) -> None:
    client = as_(owner)
    fill(client, 0, 2)
    few = {name: queries(client, f"{V1}/{name}?page_size=200") for name in LISTS}
    fill(client, 2, 6)
    many = {name: queries(client, f"{V1}/{name}?page_size=200") for name in LISTS}

    assert many == few
    assert max(many.values()) <= MOST_QUERIES, many


def test_pages_do_not_miss_or_repeat_rows_that_sort_alike(owner: User) -> None:
    client = as_(owner)
    fill(client, 0, 5)
    seen: list[int] = []
    address = f"{V1}/servers?page_size=2&ordering=kind"
    while address:
        page = client.get(address).json()
        seen += [row["id"] for row in page["results"]]
        address = page["next"]

    assert len(seen) == len(set(seen)) == 5


@pytest.mark.soak
def test_the_first_page_of_ten_thousand_providers_and_a_hundred_thousand_entries_comes_within_200_ms(
    owner: User,
) -> None:
    with changes(actor=None, via="system"):
        made = Provider.objects.bulk_create(
            [
                Provider(
                    name=f"box {n}", slug=f"box-{n}", base_url=f"http://10.0.{n % 250}.1:8000/v1", kind="vllm"
                )
                for n in range(10_000)
            ],
            batch_size=500,
        )
        UpstreamModel.objects.bulk_create(
            [UpstreamModel(provider=provider, name=f"model-{n}") for provider in made for n in range(3)],
            batch_size=500,
        )
    entries(100_500)
    client, told = as_(owner), {}
    for path in (
        "providers",
        "servers?ordering=-name",
        "providers?search=box-77",
        "providers?page=150",
        "audit",
        "audit?entity_type=ai_server",
        "audit?page=1500",
    ):
        client.get(f"{V1}/{path}")
        took = []
        for _ in range(5):
            began = time.monotonic()
            answer = client.get(f"{V1}/{path}")
            took.append(time.monotonic() - began)
        assert answer.status_code == 200
        told[path] = (sorted(took)[2], queries(client, f"{V1}/{path}"), answer.json())
        print(f"{connection.vendor} {path}: {told[path][0] * 1000:.0f} ms, {told[path][1]} queries")

    assert told["providers"][2]["count"] >= 10_000
    assert told["audit"][2]["count_estimated"] is True
    assert told["audit"][2]["count"] == Head.objects.get().seq
    assert all(number <= MOST_QUERIES for _, number, _ in told.values())
    assert max(told["providers"][0], told["audit"][0]) < MOST_SECONDS


def entries(number: int) -> None:
    """So many more entries, properly chained."""
    head, now = Head.objects.get(), timezone.now()
    rows = []
    for n in range(number):
        head.seq += 1
        entry = Entry(
            seq=head.seq,
            timestamp=now,
            action="update_server",
            entity_type="ai_server" if n % 2 else "api_key",
            entity_id=str(n % 900),
            entity_name="box",
            username="owner",
            via="api",
            changes={"priority": [n, n + 1]},
        )
        entry.hash = head.hash = chain.link(head.hash, entry)
        rows.append(entry)
    Entry.objects.bulk_create(rows, batch_size=500)
    head.save()
