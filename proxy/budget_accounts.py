"""The books of budgets: what workers are granted, what the drainer charges, what the dead give back. Database only.

For each account, always, and after each transaction here:

* `held` is the sum of `granted - settled` over its grants;
* `spent` is the sum of the costs of the usage rows that name it;
* when something is granted, `spent + held` is at most the amount of the budget.

A worker's record says which accounts its attempt is charged to (`budgets`) and how much of the cost came out of the worker's
grant at each (`grants`). The drainer, in the transaction that inserts the row, adds the cost to `spent` and moves the second
number from `granted - settled` to settled; so for each living worker, `granted - settled` is what its purse still has, and
what its records that are not drained yet have taken. At rest, when everything is drained and idle grants are given back,
`held` is 0. A request is charged to the window in which it began, with all its attempts.

Whoever changes a grant has locked its account before, and accounts are locked in the order of their ids.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from proxy.models.budgets import Budget, BudgetAccount, BudgetGrant, start_of
from proxy.purses import WINDOWS, AccountKey
from proxy.usage_rows import Row

logger = logging.getLogger(__name__)

SHARE = 32
"""A grant is at least this part of what remains, so that a worker seldom asks; and near the end it asks for each request."""

MOST = 2**45
"""What one attempt can cost, about 35,000 dollars: a provider may tell any number of tokens, and the sums are 64 bits wide."""

LOST_AFTER = timedelta(days=1)
"""A grant that nobody touched for so long is of a worker whose spool is lost: a living one gives back what is idle."""


class NoSuchBudget(Exception):
    """It was deleted; the next snapshot knows nothing of it any more."""


# -- the worker's side -------------------------------------------------------------------------------------------------


def take(worker: str, key: AccountKey, amount: int, consumed: int) -> int | None:
    """Grant a worker `amount` more, or a share of what remains if that is larger; all that it is granted now, or None.

    consumed: what the worker has spent of earlier grants, should the books have lost them. One conditional UPDATE decides,
    so that workers who ask at the same time are never granted more than there is. Raises NoSuchBudget, DatabaseError.
    """
    with transaction.atomic():
        limit = Budget.objects.filter(pk=key.budget_id).values_list("amount", flat=True).first()
        if limit is None:
            raise NoSuchBudget
        if amount > limit:
            return None
        account = _account(key)
        share = (limit - account.spent - account.held) // SHARE
        wanted = [share, amount] if share > amount else [amount]
        granted = next((each for each in wanted if _hold(account, each, limit)), None)
        if granted is None:
            return None
        grant, _ = BudgetGrant.objects.get_or_create(
            worker=worker,
            account=account,
            defaults={"granted": consumed, "settled": consumed, "touched_at": timezone.now()},
        )
        BudgetGrant.objects.filter(pk=grant.pk).update(
            granted=F("granted") + granted, touched_at=timezone.now()
        )
        return grant.granted + granted


def _hold(account: BudgetAccount, amount: int, limit: int) -> bool:
    # Columns of this row only: what is asked of others is not asked again when the row was locked meanwhile.
    rows = BudgetAccount.objects.filter(pk=account.pk, spent__lte=limit - amount - F("held"))
    return bool(rows.update(held=F("held") + amount))


def give_back(worker: str, key: AccountKey, kept: int) -> int:
    """Return what a worker was granted beyond `kept`; all that it is granted now."""
    with transaction.atomic():
        account = _find(key, locked=True)
        grant = BudgetGrant.objects.filter(worker=worker, account=account).first() if account else None
        if account is None or grant is None:
            return 0
        surplus = grant.granted - max(kept, grant.settled)
        if surplus <= 0:
            return grant.granted
        BudgetAccount.objects.filter(pk=account.pk).update(held=F("held") - surplus)
        BudgetGrant.objects.filter(pk=grant.pk).update(
            granted=F("granted") - surplus, touched_at=timezone.now()
        )
        return grant.granted - surplus


def _find(key: AccountKey, *, locked: bool = False) -> BudgetAccount | None:
    rows = BudgetAccount.objects.select_for_update() if locked else BudgetAccount.objects
    return rows.filter(budget=key.budget_id, window=key.window, window_start=start_of(key.start)).first()


def _account(key: AccountKey) -> BudgetAccount:
    found = _find(key)
    if found is None:
        found, _ = BudgetAccount.objects.get_or_create(
            budget_id=key.budget_id, window=key.window, window_start=start_of(key.start)
        )
    return found


# -- the drainer's side ------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Sum:
    """Of one account. granted: the part of the cost that came out of the worker's grant."""

    cost: int = 0
    granted: int = 0


def charge(worker: str, rows: Iterable[Row], records: Mapping[UUID, Mapping[str, Any]]) -> None:
    """Charge new usage rows to the accounts that their records name. Inside the transaction that inserts the rows.

    worker: whose records they are. A budget that was deleted meanwhile has no account.
    """
    sums: dict[AccountKey, Sum] = {}
    for row in rows:
        cost = min(row["cost_nanodollars"] or 0, MOST)
        for key, granted in _charges(records[row["id"]]):
            one = sums.setdefault(key, Sum())
            one.cost += cost
            one.granted += granted
    if not sums:
        return
    known = set(Budget.objects.filter(pk__in={key.budget_id for key in sums}).values_list("pk", flat=True))
    by_pk = {_account(key).pk: one for key, one in sums.items() if key.budget_id in known}
    accounts = BudgetAccount.objects.select_for_update(of=("self",)).select_related("budget")
    for account in accounts.filter(pk__in=by_pk).order_by("pk"):
        _spend(account, by_pk[account.pk].cost)
    for grant in BudgetGrant.objects.filter(worker=worker, account__in=by_pk).order_by("account"):
        _settle(grant, by_pk[grant.account_id].granted)


def _charges(record: Mapping[str, Any]) -> Iterable[tuple[AccountKey, int]]:
    """(account, how much of the grant is used up) of a record; what makes no sense there is passed over."""
    budgets, grants = record.get("budgets"), record.get("grants")
    if not isinstance(budgets, list):
        return
    for place, entry in enumerate(budgets):
        if not (isinstance(entry, list) and len(entry) == 3):
            continue
        budget_id, window, start = entry
        if type(budget_id) is int and window in WINDOWS and type(start) is int:
            granted = grants[place] if isinstance(grants, list) and place < len(grants) else 0
            yield AccountKey(budget_id, window, start), granted if type(granted) is int and granted > 0 else 0


def _spend(account: BudgetAccount, cost: int) -> None:
    if not cost:
        return
    before, after, budget = account.spent, account.spent + cost, account.budget
    BudgetAccount.objects.filter(pk=account.pk).update(spent=F("spent") + cost)
    for percent in sorted({budget.warn_at_percent, 100}):
        if before * 100 < budget.amount * percent <= after * 100:
            BudgetAccount.objects.filter(pk=account.pk).update(warned_at=timezone.now())
            logger.warning(
                "%s has reached %d %% of its %.2f US dollars", account, percent, budget.amount / 1e9
            )


def _settle(grant: BudgetGrant, granted: int) -> None:
    moved = min(granted, grant.granted - grant.settled)
    if moved:
        BudgetGrant.objects.filter(pk=grant.pk).update(
            settled=F("settled") + moved, touched_at=timezone.now()
        )
        BudgetAccount.objects.filter(pk=grant.account_id).update(held=F("held") - moved)


def release(worker: str) -> None:
    """Return all that a dead worker was granted and has not spent; its last record is in."""
    _release(worker=worker)


def release_lost() -> None:
    """Return what workers were granted whose spool will never come: their machine is gone, or its disk."""
    _release(touched_at__lt=timezone.now() - LOST_AFTER)


def _release(**which: Any) -> None:
    grants = BudgetGrant.objects.filter(**which)
    if not grants.exists():
        return
    with transaction.atomic():
        pks = set(grants.values_list("account", flat=True))
        # Evaluated for its locks: what the grants say is read after that.
        list(BudgetAccount.objects.select_for_update().filter(pk__in=pks).order_by("pk"))
        for grant in BudgetGrant.objects.filter(**which, account__in=pks):
            BudgetAccount.objects.filter(pk=grant.account_id).update(
                held=F("held") - (grant.granted - grant.settled)
            )
            grant.delete()
