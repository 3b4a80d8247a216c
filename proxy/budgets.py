"""What a request may cost: it is held against every budget that applies to it, before it is sent, and settled afterwards.

A hold is what the request may cost at the dearest of its candidates: an estimate of its prompt, and the completion tokens that
it asks for. It lasts until the request ends, whatever its attempts cost meanwhile; each attempt takes its true cost out of what
this worker was granted (`proxy.grants`) when it is settled, and its record tells the drainer (`proxy.budget_accounts`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import NamedTuple, Self

from proxy.candidates import Candidate
from proxy.errors import BudgetExceeded, BudgetUnavailable, GatewayError, PriceUnknown
from proxy.grants import Account, Grants
from proxy.purses import AccountKey, Allowance, Purse
from proxy.snapshot import Snapshot

BYTES_PER_TOKEN = 3
"""Of a prompt. Fewer than a token usually has, because a hold must rather be too large than too small."""
COMPLETION_TOKENS = 4096
"""Held for an answer to a request that sets no limit, or the window of the model where that is smaller."""
MOST_TOKENS = 2**40


class Charge(NamedTuple):
    """An account that attempts are charged to. purse: what pays, where it is a hard budget's."""

    key: AccountKey
    purse: Purse | None = None


class Hold:
    """What one request holds, of its own budgets and of those of the providers that it may be sent to.

    A context manager: leaving it releases everything. candidates: those that the budgets allow; left_out: a line for each of
    the others.
    """

    __slots__ = ("_own", "_providers", "_reserved", "candidates", "left_out")

    def __init__(self, candidates: tuple[Candidate, ...] = ()) -> None:
        self.candidates = candidates
        self.left_out: list[str] = []
        self._own: list[Charge] = []
        self._providers: dict[int, Charge] = {}
        self._reserved: dict[int, tuple[Account, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        reserved, self._reserved = self._reserved, {}
        for account, amount in reserved.values():
            account.purse.release(amount, time.monotonic())

    def accounts(self, provider_id: int) -> list[AccountKey]:
        """What an attempt at this provider is charged to, as its start record says."""
        return [charge.key for charge in self._of(provider_id)]

    def settle(self, provider_id: int, cost: int) -> list[int]:
        """Take what an attempt has cost out of the grants; how much of it was there, for each of `accounts`."""
        return [charge.purse.consume(cost) if charge.purse else 0 for charge in self._of(provider_id)]

    async def own(self, grants: Grants, allowance: Allowance, amount: int) -> None:
        """Hold `amount` of a budget of the caller."""
        self._own.append(await self._charge(grants, allowance, amount))

    async def provider(self, grants: Grants, allowance: Allowance, provider_id: int, amount: int) -> None:
        """Hold `amount` of the budget of a provider; what is held of it already for another of its models counts."""
        self._providers[provider_id] = await self._charge(grants, allowance, amount)

    async def _charge(self, grants: Grants, allowance: Allowance, amount: int) -> Charge:
        # The window may end while others are waited for: a request stays in the one that it began in.
        account, already = self._reserved.get(allowance.id) or (grants.account(allowance), 0)
        purse = account.purse
        if not allowance.hard:
            return Charge(purse.key)
        if amount > already:
            await grants.reserve(account, amount - already)
            self._reserved[allowance.id] = (account, amount)
        return Charge(purse.key, purse)

    async def again(self, grants: Grants) -> None:
        """Before another attempt: what the earlier ones have cost came out of what is held, which the budgets have to have once
        more. Raises BudgetExceeded or BudgetUnavailable."""
        for account, _ in self._reserved.values():
            await grants.reserve(account, 0)

    def _of(self, provider_id: int) -> Iterable[Charge]:
        own = self._providers.get(provider_id)
        return self._own if own is None else (*self._own, own)


NOTHING = Hold()
"""Where there are no budgets; nobody changes it."""


class Asked(NamedTuple):
    """How much a request asks for. completion_tokens: at most; 0 when it does not say. choices: how many answers."""

    body_bytes: int
    completion_tokens: int = 0
    choices: int = 1


async def hold(
    grants: Grants,
    snapshot: Snapshot,
    budgets: Sequence[int],
    candidates: tuple[Candidate, ...],
    asked: Asked,
) -> Hold:
    """Hold a request against the caller's `budgets` (ids) and those of the candidates' providers.

    A candidate whose provider's budget is used up, or whose price is unknown where a hard budget applies, is left out.
    Raises PriceUnknown, BudgetExceeded or BudgetUnavailable when none is left, or a budget of the caller does not do.
    """
    held = Hold(candidates)
    if not budgets and all(each.upstream.budget is None for each in candidates):
        return held
    own = [snapshot.budgets[each] for each in budgets if each in snapshot.budgets]
    try:
        priced = await _affordable(held, grants, snapshot, own, candidates, asked)
        dearest = max(cost for _, cost in priced)
        for allowance in own:
            await held.own(grants, allowance, dearest)
    except BaseException:
        held.release()
        raise
    held.candidates = tuple(candidate for candidate, _ in priced)
    return held


async def _affordable(
    held: Hold,
    grants: Grants,
    snapshot: Snapshot,
    own: Sequence[Allowance],
    candidates: Sequence[Candidate],
    asked: Asked,
) -> list[tuple[Candidate, int]]:
    """The candidates that their providers' budgets allow, with what the request may cost at each."""
    strict = any(each.hard for each in own)
    priced: list[tuple[Candidate, int]] = []
    refusal: GatewayError | None = None
    for candidate in candidates:
        provider = candidate.upstream
        allowance = snapshot.budgets.get(provider.budget) if provider.budget is not None else None
        cost = most(candidate, asked)
        if cost is None and (strict or (allowance is not None and allowance.hard)):
            held.left_out.append(f"{candidate.full_name}: its price is unknown, and there is a budget")
            refusal = refusal or PriceUnknown(_unpriced(candidate), param="model")
            continue
        if allowance is not None:
            try:
                await held.provider(grants, allowance, provider.id, cost or 0)
            except (BudgetExceeded, BudgetUnavailable) as error:
                held.left_out.append(f"{candidate.full_name}: {error.code}, of the provider")
                refusal = error
                continue
        priced.append((candidate, cost or 0))
    if not priced and refusal is not None:
        raise refusal
    return priced


def most(candidate: Candidate, asked: Asked) -> int | None:
    """What a request may cost at a candidate, in nano-dollars; None where its price is unknown."""
    if candidate.price is None:
        return None
    window = candidate.window or MOST_TOKENS
    completion = min(asked.completion_tokens or COMPLETION_TOKENS, window) * asked.choices
    return candidate.price.dearest(asked.body_bytes // BYTES_PER_TOKEN + 1, completion)


def _unpriced(candidate: Candidate) -> str:
    return f"The price of {candidate.full_name[:200]} is not known, and there is a budget to keep."
