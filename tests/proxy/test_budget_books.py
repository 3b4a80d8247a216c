"""The books of budgets: whoever dies when, what was spent is the sum of the rows, and at rest nothing is held."""

from __future__ import annotations

import asyncio
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.db import IntegrityError, OperationalError, connection, transaction
from django.db.models import F, Sum
from django.utils import timezone
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from audit.changes import changes
from proxy import budget_accounts, usage
from proxy.budget_accounts import SHARE
from proxy.budgets import Hold
from proxy.errors import BudgetExceeded, BudgetUnavailable
from proxy.grants import Accounts, Grants
from proxy.models import Budget, BudgetAccount, BudgetGrant, GatewayKey, UsageRecord
from proxy.purses import AccountKey, Allowance, window_at
from proxy.spool import new_attempt_id
from proxy.usage_rows import insert, usage_row

WORKER = "a" * 32


def a_budget(amount: int = 1000, **fields: Any) -> Budget:
    with changes(actor=None, via="system"):
        key = GatewayKey.objects.create(
            name=uuid.uuid4().hex, key_id=uuid.uuid4().hex[:10], hmac="0" * 64, pepper=1
        )
        return Budget.objects.create(gateway_key=key, amount=amount, **{"window": "total", **fields})


def key_of(budget: Budget) -> AccountKey:
    return AccountKey(budget.pk, budget.window, window_at(budget.window, time.time())[0])


def a_record(charges: Any, grants: Any, cost: int | None) -> dict[str, Any]:
    """As the spool gives it back: JSON knows no tuples."""
    return {
        "id": new_attempt_id(),
        "status": "success",
        "cost_nanodollars": cost,
        "price_id": None if cost is None else 1,
        "budgets": [list(each) for each in charges],
        "grants": grants,
    }


def book(worker: str, *records: dict[str, Any]) -> None:
    pairs = {row["id"]: (row, record) for record in records if (row := usage_row(record)) is not None}
    with transaction.atomic():
        new = insert([row for row, _ in pairs.values()])
        usage._book(worker, new, {key: each for key, (_, each) in pairs.items()})


def numbers() -> tuple[int, int]:
    account = BudgetAccount.objects.get()
    return account.spent, account.held


# -- one budget ----------------------------------------------------------------------------------------------------------


@pytest.mark.django_db
def test_a_budget_is_of_exactly_one() -> None:
    budget = a_budget()
    with changes(actor=None, via="system"):
        team = Group.objects.create(name="ml")
    for wrong in ({"team": team}, {"gateway_key": None}):
        with pytest.raises(IntegrityError), transaction.atomic():
            Budget.objects.filter(pk=budget.pk).update(**wrong)
    with pytest.raises(ValidationError, match="exactly one"):
        Budget(gateway_key=budget.gateway_key, team=team, amount=1).full_clean()
    with pytest.raises(ValidationError, match="a role, not a team"):
        Budget(team=Group.objects.get(name="viewer"), amount=1).full_clean()


@pytest.mark.django_db
@pytest.mark.parametrize("column", [{"amount": -1}, {"window": "year"}, {"warn_at_percent": 0}])
def test_the_database_itself_refuses_what_makes_no_sense(column: dict[str, Any]) -> None:
    budget = a_budget()
    with pytest.raises(IntegrityError), transaction.atomic():
        Budget.objects.filter(pk=budget.pk).update(**column)


@pytest.mark.django_db
def test_a_grant_is_a_share_of_what_remains_or_what_is_needed_if_that_is_more() -> None:
    key = key_of(a_budget(3200))
    assert budget_accounts.take(WORKER, key, 10, 0) == 3200 // SHARE
    assert budget_accounts.take(WORKER, key, 500, 0) == 600
    assert numbers() == (0, 600)


@pytest.mark.django_db
def test_the_last_of_a_budget_is_granted_and_not_more() -> None:
    key = key_of(a_budget(100))
    assert budget_accounts.take(WORKER, key, 97, 0) == 97
    assert budget_accounts.take(WORKER, key, 4, 0) is None
    assert budget_accounts.take(WORKER, key, 3, 0) == 100
    assert budget_accounts.take(WORKER, key, 2**63 - 1, 0) is None
    assert numbers() == (0, 100)


@pytest.mark.django_db
def test_a_budget_that_was_deleted_grants_nothing_and_is_charged_nothing() -> None:
    budget = a_budget()
    key = key_of(budget)
    with changes(actor=None, via="system"):
        budget.delete()
    with pytest.raises(budget_accounts.NoSuchBudget):
        budget_accounts.take(WORKER, key, 1, 0)
    book(WORKER, a_record([key], [0], 5))
    assert UsageRecord.objects.count() == 1
    assert not BudgetAccount.objects.exists()


@pytest.mark.django_db
def test_what_a_record_says_twice_is_charged_once() -> None:
    key = key_of(a_budget())
    budget_accounts.take(WORKER, key, 40, 0)
    record = a_record([key], [25], 25)
    book(WORKER, record)
    book(WORKER, record)
    assert numbers() == (25, 15)


@pytest.mark.django_db
def test_a_cost_beyond_what_was_granted_is_spent_all_the_same() -> None:
    key = key_of(a_budget())
    budget_accounts.take(WORKER, key, 40, 0)
    book(WORKER, a_record([key], [40], 90))
    assert numbers() == (90, 0)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("budgets", "grants"),
    [("x", None), ([1], [1]), ([[1, "year", 0]], [1]), ([["1", "total", 0]], [1]), ([[0, "total", 0]], [-5])],
)
def test_nonsense_in_a_record_is_charged_to_nobody_and_keeps_no_row_out(budgets: Any, grants: Any) -> None:
    a_budget()
    book(WORKER, {**a_record([], [], 5), "budgets": budgets, "grants": grants})
    assert UsageRecord.objects.count() == 1
    assert not BudgetAccount.objects.exists()


@pytest.mark.django_db
def test_saving_a_budget_never_changes_what_was_spent() -> None:
    budget = a_budget()
    stale = Budget.objects.get(pk=budget.pk)
    book(WORKER, a_record([key_of(budget)], [0], 700))
    with changes(actor=None, via="system"):
        stale.amount = 5000
        stale.save()
    assert numbers() == (700, 0)


@pytest.mark.django_db
def test_reaching_the_percentage_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    budget = a_budget(hard=False, warn_at_percent=50)
    for cost in (499, 1, 100, 399, 1, 500):
        book(WORKER, a_record([key_of(budget)], [0], cost))
    assert [record.getMessage().partition("has reached")[2][:6] for record in caplog.records] == [
        " 50 % ",
        " 100 %",
    ]
    assert BudgetAccount.objects.get().warned_at is not None
    assert numbers() == (1500, 0)


@pytest.mark.django_db
def test_the_dead_give_back_what_they_have_not_spent() -> None:
    key = key_of(a_budget())
    budget_accounts.take(WORKER, key, 40, 0)
    budget_accounts.take("b" * 32, key, 60, 0)
    book(WORKER, a_record([key], [10], 10))
    budget_accounts.release(WORKER)
    budget_accounts.release(WORKER)
    assert numbers() == (10, 60)
    assert BudgetGrant.objects.count() == 1


@pytest.mark.django_db
def test_a_grant_of_a_worker_whose_spool_never_comes_goes_back_after_a_day() -> None:
    key = key_of(a_budget())
    budget_accounts.take(WORKER, key, 40, 0)
    budget_accounts.release_lost()
    assert numbers() == (0, 40)
    BudgetGrant.objects.update(touched_at=timezone.now() - timedelta(days=1, minutes=1))
    budget_accounts.release_lost()
    assert numbers() == (0, 0)


@pytest.mark.django_db(transaction=True)
def test_r42_workers_who_ask_at_the_same_time_are_not_granted_more_than_there_is() -> None:
    budget = a_budget(100)
    key = key_of(budget)

    def ask(number: int) -> bool:
        try:
            return budget_accounts.take(f"{number:032x}", key, 10, 0) is not None
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        granted = list(pool.map(ask, range(40)))
    assert sum(granted) == 10
    assert numbers() == (0, 100)


# -- everything, in any order ----------------------------------------------------------------------------------------------


class Flaky:
    """The real books behind a network that may lose the question or the answer."""

    def __init__(self) -> None:
        self.lose = ""

    def take(self, worker: str, key: AccountKey, amount: int, consumed: int) -> int | None:
        granted: int | None = self._lossy(Accounts.take, worker, key, amount, consumed)
        return granted

    def give_back(self, worker: str, key: AccountKey, kept: int) -> int:
        granted: int = self._lossy(Accounts.give_back, worker, key, kept)
        return granted

    def _lossy(self, function: Any, *args: Any) -> Any:
        lose, self.lose = self.lose, ""
        if lose == "question":
            raise OperationalError("the server is away")
        answer = function(*args)
        if lose == "answer":
            raise OperationalError("the server is away")
        return answer


class Worker:
    """A worker as the books see it: what it was granted, what its requests hold, and what is in its spool."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.uid = uuid.uuid4().hex
        self.ledger = Flaky()
        self.grants = Grants(self.uid, ledger=self.ledger)
        self.holds: list[Hold] = []
        self.spool: list[dict[str, Any]] = []
        self._loop = loop

    def close(self) -> None:
        self._loop.run_until_complete(self.grants.close())


WHICH = st.integers(0, 1)
LOSE = st.sampled_from(["", "", "", "question", "answer"])
AMOUNT = st.integers(1, 60)


class Books(RuleBasedStateMachine):
    """Two workers, one drainer, one budget; what is known of them is checked after every step."""

    @initialize(amount=st.integers(0, 400))
    def begin(self, amount: int) -> None:
        UsageRecord.objects.all().delete()
        self.loop = asyncio.new_event_loop()
        self.budget = a_budget(amount)
        self.workers = [Worker(self.loop), Worker(self.loop)]
        self.beyond, self.largest = 0, amount

    def teardown(self) -> None:
        for number in range(2):
            self.kill(number)
        assert BudgetAccount.objects.filter(budget=self.budget).aggregate(n=Sum("held"))["n"] in (0, None)
        for worker in self.workers:
            worker.close()
        self.loop.close()

    @property
    def allowance(self) -> Allowance:
        return Allowance(self.budget.pk, "this key", "total", True)

    @rule(number=WHICH, amount=AMOUNT, lose=LOSE)
    def ask(self, number: int, amount: int, lose: str) -> None:
        worker = self.workers[number]
        worker.ledger.lose = lose
        account = worker.grants.account(self.allowance)
        account.rests_until = 0.0
        hold = Hold()
        try:
            self.loop.run_until_complete(hold.own(worker.grants, self.allowance, amount))
        except (BudgetExceeded, BudgetUnavailable):
            return
        finally:
            worker.ledger.lose = ""
        worker.holds.append(hold)

    @rule(number=WHICH, which=st.integers(0, 9), cost=st.integers(0, 90), goes_on=st.booleans())
    def settle(self, number: int, which: int, cost: int, goes_on: bool) -> None:
        worker = self.workers[number]
        if not worker.holds:
            return
        hold = worker.holds[which % len(worker.holds)]
        granted = hold.settle(0, cost)
        worker.spool.append(a_record(hold.accounts(0), granted, cost))
        self.beyond += cost - sum(granted)
        if not goes_on:
            worker.holds.remove(hold)
            hold.release()

    @rule(number=WHICH, which=st.integers(0, 9))
    def fail(self, number: int, which: int) -> None:
        worker = self.workers[number]
        if worker.holds:
            worker.holds.pop(which % len(worker.holds)).release()

    @rule(number=WHICH, lose=LOSE)
    def idle(self, number: int, lose: str) -> None:
        worker = self.workers[number]
        worker.ledger.lose = lose
        account = worker.grants.account(self.allowance)
        account.rests_until, account.purse.used_at = 0.0, float("-inf")

        async def sweep() -> None:
            worker.grants.sweep()
            if account.asking is not None:
                await account.asking

        self.loop.run_until_complete(sweep())
        worker.ledger.lose = ""

    @rule(number=WHICH, dies=st.booleans(), repeats=st.booleans())
    def drain(self, number: int, dies: bool, repeats: bool) -> None:
        worker = self.workers[number]
        if dies:
            with transaction.atomic():
                book(worker.uid, *worker.spool)
                transaction.set_rollback(True)
        book(worker.uid, *worker.spool)
        if repeats:
            book(worker.uid, *worker.spool)
        worker.spool.clear()

    @rule(number=WHICH)
    def kill(self, number: int) -> None:
        """kill -9: what it held is gone, and the drainer finds what it left."""
        worker, self.workers[number] = self.workers[number], Worker(self.loop)
        with transaction.atomic():
            book(worker.uid, *worker.spool)
            budget_accounts.release(worker.uid)
        worker.close()

    @rule(amount=st.integers(0, 400))
    @precondition(lambda self: hasattr(self, "budget"))
    def edit(self, amount: int) -> None:
        with changes(actor=None, via="system"):
            self.budget.amount = amount
            self.budget.save()
        self.largest = max(self.largest, amount)

    @invariant()
    def the_books_are_right(self) -> None:
        if not hasattr(self, "budget"):
            return
        account = BudgetAccount.objects.filter(budget=self.budget).first()
        spent = UsageRecord.objects.aggregate(total=Sum("cost_nanodollars"))["total"] or 0
        assert (account.spent if account else 0) == spent
        grants = BudgetGrant.objects.filter(account=account)
        held = grants.aggregate(total=Sum(F("granted") - F("settled")))["total"] or 0
        assert (account.held if account else 0) == held
        assert spent + held <= self.largest + self.beyond
        for worker in self.workers:
            self._agrees(worker, grants.filter(worker=worker.uid).first())

    def _agrees(self, worker: Worker, grant: BudgetGrant | None) -> None:
        """What the books say a worker has is what it has; more only while it does not know whether it was granted it."""
        account = worker.grants.account(self.allowance)
        purse = account.purse
        waiting = sum(sum(record["grants"]) for record in worker.spool)
        left = grant.granted - grant.settled if grant else 0
        assert left >= purse.granted - purse.consumed + waiting
        if not account.unsure:
            assert left == purse.granted - purse.consumed + waiting
        assert purse.reserved == sum(amount for hold in worker.holds for _, amount in hold._reserved.values())


@pytest.mark.django_db(transaction=True)
def test_the_books_are_right_whatever_happens_in_whatever_order() -> None:
    run_state_machine_as_test(
        Books,
        settings=settings(
            max_examples=15,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
