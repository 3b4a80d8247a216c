"""Keys with budgets on a real installation, and what its books say of them."""

from __future__ import annotations

import time

from tests.support.gateway import CHANGE_SECONDS, Gateway
from tests.support.rows import query

GIVE = """
from audit.changes import changes
from providers.models import Provider
from proxy.models import Budget, GatewayKey, ModelPrice
from proxy.prices import add_override
with changes(actor=None, via="command"):
    for provider in Provider.objects.filter(slug="upstream"):
        add_override(ModelPrice(model="*", prompt=0, completion=1_000_000), provider)
    key = GatewayKey.objects.get(key_id=KEY_ID)
    Budget.objects.create(gateway_key=key, amount=AMOUNT, window="total")
"""
BOOKS = """
SELECT COALESCE((SELECT spent FROM proxy_budgetaccount), 0), COALESCE((SELECT held FROM proxy_budgetaccount), 0),
       COALESCE(SUM(cost_nanodollars), 0), COUNT(*) FROM proxy_usagerecord
"""


def give_budget(gateway: Gateway, key: str, amount: int) -> None:
    """A budget in nano-dollars for a key; until every worker has heard of it.

    A completion token of the provider `upstream` costs a nano-dollar from then on, and its prompts nothing.
    """
    gateway.shell(GIVE.replace("KEY_ID", repr(key[9:19])).replace("AMOUNT", str(amount)))
    time.sleep(CHANGE_SECONDS)


def books(gateway: Gateway) -> tuple[int, int, int, int]:
    """(spent, held, sum of the costs of all rows, number of rows), all of one moment. Of the only budget there is."""
    ((spent, held, cost, rows),) = query(gateway, BOOKS)
    return int(spent), int(held), int(cost), int(rows)


def settled(gateway: Gateway, rows: int, *, seconds: float = 40.0) -> tuple[int, int]:
    """(spent, held) once there are so many rows and what is idle was given back."""
    deadline = time.monotonic() + seconds
    while True:
        spent, held, cost, found = books(gateway)
        assert spent == cost, "what was spent is not the sum of the rows"
        if found == rows and held == 0:
            return spent, held
        assert time.monotonic() < deadline, (books(gateway), gateway.logs()[-3000:])
        time.sleep(0.2)
