"""What this worker was granted of budgets: asked for when it is not enough, given back when nobody uses it.

A purse gives away what it has without asking anybody. Where that is not enough the books are asked, in a thread, once at a
time, while the requests that need it wait. Redis has no part in this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar

from django.db import DatabaseError, InterfaceError, connection

from proxy import budget_accounts
from proxy.budget_accounts import NoSuchBudget
from proxy.errors import BudgetExceeded, BudgetUnavailable, GatewayError
from proxy.purses import AccountKey, Allowance, Purse, window_at

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

REST_SECONDS = 1.0
"""How long books that refused, or did not answer, are not asked again."""
IDLE_SECONDS = 10.0
"""After which what nobody uses of a grant goes back."""
WAIT_SECONDS = 3.0
"""The longest that a request waits for an answer of the books."""
GRACE_SECONDS = 0.05
"""And the shortest: that this process is busy does not mean that the books do not answer."""
CLOSE_SECONDS = 5.0
KEEP_SECONDS = 86_400.0
"""For which a purse outlives its window, so that a clock which is set back finds it again."""


class Ledger(Protocol):
    """The books: `proxy.budget_accounts` says what the functions do. Called in a thread."""

    def take(self, worker: str, key: AccountKey, amount: int, consumed: int) -> int | None: ...
    def give_back(self, worker: str, key: AccountKey, kept: int) -> int: ...


class Accounts:
    """The real books."""

    take = staticmethod(budget_accounts.take)
    give_back = staticmethod(budget_accounts.give_back)


@dataclass(slots=True, eq=False)
class Account:
    """A purse, and how things stand with its books.

    asking: while they are asked, since `asked_at`. Until `rests_until` they are not asked for `short` or more: they had too
    little, or (silent) did not answer. unsure: they may have granted what we do not know of.
    """

    allowance: Allowance
    purse: Purse
    asking: asyncio.Task[None] | None = None
    asked_at: float = 0.0
    rests_until: float = 0.0
    short: int = 0
    silent: bool = False
    unsure: bool = False

    def keep_away(self) -> None:
        self.silent = self.unsure = True
        self.short, self.rests_until = 0, time.monotonic() + REST_SECONDS

    def refusal(self) -> GatewayError:
        if self.silent:
            return BudgetUnavailable()
        return exceeded(self.allowance, self.purse.ends)


class Grants:
    """The accounts of one worker. worker: its uid, which its spool segments are named after. clock: epoch seconds."""

    def __init__(
        self, worker: str, *, ledger: Ledger | None = None, clock: Callable[[], float] = time.time
    ) -> None:
        self.ledger: Ledger = ledger or Accounts()
        self._worker = worker
        self._clock = clock
        self._present: dict[int, Account] = {}
        self._accounts: dict[AccountKey, Account] = {}
        # One thread: the database is never asked by many at a time, and what was asked first is answered first.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="budgets")

    def account(self, allowance: Allowance) -> Account:
        """The account of the window that lies around now."""
        now = self._clock()
        found = self._present.get(allowance.id)
        if (
            found is not None
            and found.allowance == allowance
            and found.purse.key.start <= now < found.purse.ends
        ):
            return found
        start, ends = window_at(allowance.window, now)
        key = AccountKey(allowance.id, allowance.window, start)
        found = self._accounts.get(key)
        if found is None:
            found = self._accounts[key] = Account(allowance, Purse(key, ends))
        found.allowance = allowance
        self._present[allowance.id] = found
        return found

    async def reserve(self, account: Account, amount: int) -> None:
        """Hold `amount`. Waits only where the grant is not enough. Raises BudgetExceeded or BudgetUnavailable."""
        purse = account.purse
        while not purse.reserve(amount, now := time.monotonic()):
            missing = amount - purse.free
            if now < account.rests_until and missing >= account.short:
                raise account.refusal()
            if account.asking is None:
                account.asked_at = now
                account.asking = asyncio.create_task(self._take(account, missing))
            await self._answer(account, now)

    def sweep(self) -> None:
        """Once a second: give back what nobody uses."""
        now = time.monotonic()
        for account in list(self._accounts.values()):
            purse = account.purse
            if account.asking is not None or now - purse.used_at < IDLE_SECONDS:
                continue
            if account.unsure or purse.granted > purse.kept:
                if now >= account.rests_until:
                    account.asked_at = now
                    account.asking = asyncio.create_task(self._give_back(account))
            elif not purse.reserved and self._clock() > purse.ends + KEEP_SECONDS:
                del self._accounts[purse.key]

    async def close(self) -> None:
        """Wait for what is asked. The grants themselves go back when the last record of this worker is drained."""
        with contextlib.suppress(TimeoutError):
            # Asked last, so answered after everything else.
            await asyncio.wait_for(self._call(_disconnect), CLOSE_SECONDS)
        self._thread.shutdown(wait=False, cancel_futures=True)

    # -- the books -----------------------------------------------------------------------------------------------------

    async def _answer(self, account: Account, now: float) -> None:
        """Wait for the books, who may have been asked a while ago. Raises BudgetUnavailable when they say nothing."""
        asking = account.asking
        assert asking is not None
        left = max(account.asked_at + WAIT_SECONDS - now, GRACE_SECONDS)
        await asyncio.wait({asking}, timeout=left)
        if not asking.done():
            raise BudgetUnavailable

    async def _take(self, account: Account, missing: int) -> None:
        purse = account.purse
        with self._asking(account):
            granted = await self._call(self.ledger.take, self._worker, purse.key, missing, purse.consumed)
            account.silent = False
            if granted is None:
                account.short, account.rests_until = missing, time.monotonic() + REST_SECONDS
            else:
                purse.granted, account.rests_until = granted, 0.0
                purse.used_at = time.monotonic()

    async def _give_back(self, account: Account) -> None:
        purse = account.purse
        # From here on it is no longer ours to give away, whether the books hear of it or not.
        purse.granted = kept = min(purse.granted, purse.kept)
        with self._asking(account):
            purse.granted = await self._call(self.ledger.give_back, self._worker, purse.key, kept)
            account.silent = account.unsure = False

    @contextmanager
    def _asking(self, account: Account) -> Iterator[None]:
        """Books that do not answer are left alone for a moment, and may have done what they were asked."""
        try:
            yield
        except (DatabaseError, InterfaceError, NoSuchBudget) as error:
            if not account.silent:
                name = account.purse.key.budget_id
                logger.warning("budget %d is served from what was granted: %s", name, error)
            account.keep_away()
        except Exception:
            logger.exception("the books of budget %d failed", account.purse.key.budget_id)
            account.keep_away()
        finally:
            account.asking = None

    async def _call(self, function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(
            self._thread, lambda: _connected(function, *args, **options)
        )


def _connected(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """Call it on a connection that is not kept, except where opening one costs more than keeping it."""
    try:
        answer = function(*args, **options)
    except Exception:
        connection.close()
        raise
    if connection.vendor != "sqlite":
        connection.close()
    return answer


def _disconnect() -> None:
    """Here, because the connection is the thread's that asks for it."""
    connection.close()


def exceeded(allowance: Allowance, ends: float) -> BudgetExceeded:
    anew = (
        ""
        if allowance.window == "total"
        else f" It begins anew at {time.strftime('%Y-%m-%d %H:%M', time.gmtime(ends))} UTC."
    )
    return BudgetExceeded(
        f"This request could cost more than is left of the budget of {allowance.of}.{anew} "
        "A smaller max_tokens makes a request cost less."
    )
