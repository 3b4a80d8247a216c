"""One attempt at one provider, as it is recorded: a start before dialling, a final on every way out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from providers.connections import Dial
from providers.errors import Interrupted, ProviderError, Stalled
from providers.wire import Usage
from proxy import estimates, metrics
from proxy.budgets import NOTHING, Hold
from proxy.candidates import Candidate
from proxy.dialects.openai import ChatRequest
from proxy.errors import UsageLogUnavailable
from proxy.inflight import Running
from proxy.limits import UNLIMITED, Held
from proxy.pricing import Price
from proxy.purses import AccountKey
from proxy.selection import Plan
from proxy.spool import Final, Spool, SpoolUnavailable, Start, new_attempt_id

BYTES_PER_TOKEN = 4
"""A rough count of what is not read yet, for the limits."""


@dataclass(slots=True, eq=False)
class Call:
    """One request of a caller, ready to be sent. `held` is what it takes of the limits of its key and owner, `hold` of budgets.

    tokens: of all its attempts so far. resume: whether a stream that breaks is gone on with. journal: its attempts so far, as each record tells them.
    cache: `hit` or `miss`, where its key keeps answers. last: the id of the attempt that began last.
    """

    running: Running
    held: Held
    purpose: str
    chat: ChatRequest
    body_bytes: int
    plan: Plan
    config_version: int
    resume: bool = False
    tokens: int = 0
    hold: Hold = NOTHING
    journal: list[dict[str, Any]] = field(default_factory=list)
    cache: str = ""
    last: str = ""

    def passed_over(self, candidate: Candidate) -> None:
        """Note for people why this one was not dialled."""
        key = candidate.credential.name if candidate.credential else None
        self.journal.append({"to": candidate.full_name, "key": key, "outcome": "key_limit_reached"})


@dataclass(slots=True)
class Attempt:
    """Use as a context manager. `settle` once the outcome is known; leaving without it settles by the exception.

    place: what it takes of the limits of the provider's key.
    tokens: of the answer so far, as far as we can tell. finish_reason: of an answer that is certainly whole. accounts: what it is charged to.
    """

    call: Call
    candidate: Candidate
    number: int
    spool: Spool
    place: Held = UNLIMITED
    id: str = field(default_factory=new_attempt_id)
    began: float = field(default_factory=time.monotonic)
    ttft_ms: int | None = None
    bytes_out: int = 0
    tokens: int = 0
    usage: Usage | None = None
    tokens_source: str = "provider"
    finish_reason: str | None = None
    accepted: bool = False
    settled: bool = False
    dial: Dial = field(default_factory=Dial)
    accounts: Sequence[AccountKey] = ()

    def __enter__(self) -> Self:
        call, candidate = self.call, self.candidate
        record: Start = {
            "id": self.id,
            "request_id": call.running.request_id,
            "attempt": self.number,
            "created_at": time.time_ns() // 1_000_000,
            "gateway_key_id": call.running.caller.id,
            "gateway_key": call.running.caller.name,
            "owner": call.running.caller.owner,
            "route": call.plan.route,
            "provider_id": candidate.upstream.id,
            "provider": candidate.upstream.slug,
            "api_key_id": candidate.credential.key_id if candidate.credential else None,
            "requested_model": call.plan.requested,
            "model": candidate.model,
            "purpose": call.purpose,
            "stream": call.chat.stream,
        }
        self.accounts = call.hold.accounts(candidate.upstream.id)
        if self.accounts:
            record["budgets"] = self.accounts
        try:
            self.spool.start(record)
        except SpoolUnavailable as error:
            raise UsageLogUnavailable from error
        call.last = self.id
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        if self.settled:
            return
        if error is None:
            self.settle("success")
        elif isinstance(error, ProviderError):
            self.settle(_status_of(error), error_code=error.code, http_status=error.upstream_status)
        elif isinstance(error, asyncio.CancelledError) and self.call.running.ending == "client_left":
            self.settle("client_disconnected", client_disconnected=True)
        elif isinstance(error, asyncio.CancelledError):
            self.settle("interrupted", error_code=self.call.running.ending or "server_shutting_down")
        else:
            self.settle("error", error_code="internal_error")

    def first_token(self) -> None:
        self.ttft_ms = self.elapsed_ms()

    def elapsed_ms(self) -> int:
        return round((time.monotonic() - self.began) * 1000)

    def settle(
        self,
        status: str,
        *,
        error_code: str = "",
        http_status: int | None = None,
        client_disconnected: bool = False,
    ) -> None:
        """Write the final record. Never raises and never waits: the spool keeps what the disk refuses."""
        self.settled = True
        usage, source = self.counted()
        cost = self.cost(usage)
        total = self.elapsed_ms()
        record: Final = {
            "id": self.id,
            "status": status,
            "error_code": error_code,
            "http_status": http_status,
            "prompt_tokens": usage.prompt,
            "completion_tokens": usage.completion,
            "cached_tokens": usage.cached,
            "cache_write_tokens": usage.cache_write,
            "reasoning_tokens": usage.reasoning,
            "tokens_source": source,
            "cost_nanodollars": cost,
            "price_id": self.price.id if self.price else None,
            "ttft_ms": self.ttft_ms,
            "duration_ms": total,
            "bytes_out": self.bytes_out,
            "client_disconnected": client_disconnected,
            "trace": self._trace(error_code or status, total),
        }
        if self.accounts:
            record["grants"] = self.call.hold.settle(self.candidate.upstream.id, cost or 0)
        if status == "success":
            # Now and not when the block is left, so that the caller's next request finds it free.
            self.call.hold.release()
        self.spool.finish(record)
        if self.accepted:
            self._correct(usage.prompt + usage.completion)
        if self.call.cache != "hit":
            metrics.attempt(self.candidate.upstream.slug, status, self.ttft_ms, usage, cost)

    def _correct(self, tokens: int) -> None:
        self.place.correct(tokens)
        self.call.tokens += tokens
        self.call.held.correct(self.call.tokens)

    def _trace(self, outcome: str, total: int) -> dict[str, Any]:
        """Why it went there: the candidates as they stood, and each attempt so far with its times in ms.

        queue: from the request's arrival to this dial; connect: until there was a connection; first_token, total: from the dial.
        """
        call, dialled = self.call, self.dial.connected
        if call.cache == "hit":
            return {"candidates": call.plan.trace, "cache": call.cache}
        call.journal.append(
            {
                "to": self.candidate.full_name,
                "key": self.candidate.credential.name if self.candidate.credential else None,
                "outcome": outcome,
                "queue": round((self.began - call.running.started) * 1000),
                "connect": None if dialled is None else round((dialled - self.began) * 1000),
                "first_token": self.ttft_ms,
                "total": total,
            }
        )
        trace: dict[str, Any] = {"candidates": call.plan.trace, "attempts": call.journal}
        if self.accounts:
            trace["budgets"] = [account.budget_id for account in self.accounts]
        if call.cache:
            trace["cache"] = call.cache
        return trace

    def counted(self) -> tuple[Usage, str]:
        """What the provider said; else an estimate, if it took the request at all (F14)."""
        if self.usage is not None:
            return self.usage, self.tokens_source
        if not self.accepted:
            return Usage(), "none"
        return Usage(estimates.of_request(self.call.chat.body), self.tokens), "estimated"

    @property
    def price(self) -> Price | None:
        """By which it is billed: the one that was known when the request was planned. An answer from the cache has none."""
        return None if self.call.cache == "hit" else self.candidate.price

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars; None where no price is known. What the provider did not take costs nothing, not even what it asks
        for each request."""
        if self.price is None:
            return None
        return self.price.cost(usage) if self.accepted or self.usage is not None else 0


def _status_of(error: ProviderError) -> str:
    if isinstance(error, Stalled):
        return "upstream_stalled"
    if isinstance(error, Interrupted):
        return "upstream_interrupted"
    return "error"
