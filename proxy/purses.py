"""What a worker knows of budgets, and the arithmetic of the money it may give away without asking. Pure: no Django, no clock.

All amounts are whole nano-dollars (10^-9 US dollars), all moments epoch seconds in UTC.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, NamedTuple

WINDOWS: Final = ("total", "day", "week", "month")
NEVER: Final = float("inf")


class AccountKey(NamedTuple):
    """Names an account: a budget in one of its windows. start: when that window began; 0 for `total`."""

    budget_id: int
    window: str
    start: int


class Allowance(NamedTuple):
    """A budget as requests need it. of: whose it is, in the words of an error. hard: whether it refuses."""

    id: int
    of: str
    window: str
    hard: bool


def window_at(window: str, now: float) -> tuple[int, float]:
    """When the window that `now` lies in began, and when the next one begins. A week begins on Monday (ISO 8601)."""
    if window == "total":
        return 0, NEVER
    day = datetime.fromtimestamp(now, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if window == "day":
        start, after = day, day + timedelta(days=1)
    elif window == "week":
        start = day - timedelta(days=day.weekday())
        after = start + timedelta(days=7)
    else:
        start = day.replace(day=1)
        after = (start + timedelta(days=32)).replace(day=1)
    return int(start.timestamp()), after.timestamp()


@dataclass(slots=True, eq=False)
class Purse:
    """One account as one worker sees it: what was granted to it, what of that is gone, and what running requests hold.

    granted: all that the account ever granted, less what was given back: `BudgetGrant.granted`. consumed: what records of
    this worker have taken out of it. reserved: held by running requests. A cost may be larger than what was held; then what
    the grant does not cover is charged without it, and the next grant covers first what is held and not granted.
    """

    key: AccountKey
    ends: float = NEVER
    granted: int = 0
    consumed: int = 0
    reserved: int = 0
    used_at: float = 0.0

    @property
    def free(self) -> int:
        """What may be held without asking the account; less than nothing when more is held than was granted."""
        return max(0, self.granted - self.consumed) - self.reserved

    @property
    def kept(self) -> int:
        """The grant without what nobody needs: what `granted` becomes when the rest is given back."""
        return self.consumed + self.reserved

    def reserve(self, amount: int, now: float) -> bool:
        """Hold `amount` for a request, if it is there."""
        if amount > self.free:
            return False
        self.reserved += amount
        self.used_at = now
        return True

    def release(self, amount: int, now: float) -> None:
        """The request that held `amount` has ended."""
        self.reserved -= amount
        self.used_at = now

    def consume(self, cost: int) -> int:
        """Take what an attempt has cost out of the grant; how much of it was there."""
        taken = min(cost, max(0, self.granted - self.consumed))
        self.consumed += taken
        return taken
