"""The books of budgets in memory, for a data plane without a database: the same rules, and a switch that takes them away."""

from __future__ import annotations

import threading
from collections import defaultdict

from django.db import OperationalError

from proxy.purses import AccountKey


class Books:
    """limits: id of a budget to its amount, in nano-dollars. away: the database does not answer. asked: each amount asked for.

    `hold_up` is waited for before each answer.
    """

    def __init__(self, limits: dict[int, int]) -> None:
        self.limits = limits
        self.away = False
        self.asked: list[int] = []
        self.granted: defaultdict[AccountKey, int] = defaultdict(int)
        self.hold_up = threading.Event()
        self.hold_up.set()

    def take(self, worker: str, key: AccountKey, amount: int, consumed: int) -> int | None:
        self._answer()
        self.asked.append(amount)
        left = self.limits[key.budget_id] - self.granted[key]
        if amount > left:
            return None
        self.granted[key] += max(amount, left // 32)
        return self.granted[key]

    def give_back(self, worker: str, key: AccountKey, kept: int) -> int:
        self._answer()
        self.granted[key] = min(self.granted[key], kept)
        return self.granted[key]

    def _answer(self) -> None:
        self.hold_up.wait(10)
        if self.away:
            raise OperationalError("the server is away")
