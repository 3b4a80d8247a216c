"""From the first run to the bill: the whole product with its real price list."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.rows import settled_usage_rows
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "model": "auto", "stream": True}
BILLS = """
import json
from proxy.models import ModelPrice, UsageRecord
rows = UsageRecord.objects.order_by("id").values("cost_nanodollars", "price_id", "prompt_tokens", "completion_tokens")
prices = ModelPrice.objects.in_bulk([row["price_id"] for row in rows])
found = [{**row, "vendor": prices[row["price_id"]].vendor, "prompt": prices[row["price_id"]].prompt} for row in rows]
print(json.dumps(found))
"""
OVERRIDE = """
from audit.changes import changes
from providers.models import Provider
from proxy import prices
from proxy.models import ModelPrice
with changes(actor=None, via="system"):
    prices.add_override(ModelPrice(model="ti*", prompt=10**9, completion=10**9), Provider.objects.get(slug="box"))
"""


def ask(gateway: Gateway, key: str) -> str:
    """One request; the version of the configuration that it used."""
    with gateway.client(key) as client:
        response = client.post("/v1/chat/completions", json=HELLO)
    assert response.status_code == 200
    return str(response.headers["x-penstock-config"])


@pytest.mark.timeout(300)
def test_a_server_of_our_own_costs_0_by_a_row_until_somebody_says_otherwise() -> None:
    with Upstream(answers.ok(chunks=4)) as upstream, Gateway(programs=["drainer"]) as gateway:
        gateway.manage("first_run", "--json")
        key = gateway.provide(f"{upstream.url}/v1", slug="box", active=True)
        before = ask(gateway, key)
        gateway.shell(OVERRIDE)
        deadline = time.monotonic() + 20
        while ask(gateway, key) == before:
            assert time.monotonic() < deadline, "the override does not arrive"
            time.sleep(0.1)
        settled_usage_rows(gateway)
        first, *_, last = json.loads(gateway.shell(BILLS).splitlines()[-1])

    assert (first["cost_nanodollars"], first["vendor"]) == (0, "openai-compatible")
    assert last["prompt"] == 10**9
    assert last["cost_nanodollars"] == (last["prompt_tokens"] + last["completion_tokens"]) * 1000 > 0
