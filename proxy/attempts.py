"""One attempt at one provider, as it is recorded: a start before dialling, a final on every way out."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from providers.client import Dial
from providers.errors import Interrupted, ProviderError, Stalled
from providers.wire import Usage
from proxy import metrics
from proxy.candidates import Candidate
from proxy.dialects.openai import ChatRequest
from proxy.errors import UsageLogUnavailable
from proxy.inflight import Running
from proxy.limits import UNLIMITED, Held
from proxy.selection import Plan
from proxy.spool import Final, Spool, SpoolUnavailable, new_attempt_id

BYTES_PER_TOKEN = 4
"""A rough count where the provider gave none; such records say `estimated`."""


@dataclass(slots=True, eq=False)
class Call:
    """One request of a caller, ready to be sent. `held` is what it takes of the limits of its key and owner.

    tokens: of all its attempts so far. resume: whether a stream that breaks is gone on with. journal: its attempts so far, as each record tells them.
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
    journal: list[dict[str, Any]] = field(default_factory=list)

    def passed_over(self, candidate: Candidate) -> None:
        """Note for people why this one was not dialled."""
        key = candidate.credential.name if candidate.credential else None
        self.journal.append({"to": candidate.full_name, "key": key, "outcome": "key_limit_reached"})


@dataclass(slots=True)
class Attempt:
    """Use as a context manager. `settle` once the outcome is known; leaving without it settles by the exception.

    place: what it takes of the limits of the provider's key.
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
    events: int = 0
    usage: Usage | None = None
    accepted: bool = False
    settled: bool = False
    dial: Dial = field(default_factory=Dial)

    def __enter__(self) -> Self:
        call, candidate = self.call, self.candidate
        try:
            self.spool.start(
                {
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
            )
        except SpoolUnavailable as error:
            raise UsageLogUnavailable from error
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
            "price_id": self.candidate.price.id if self.candidate.price else None,
            "ttft_ms": self.ttft_ms,
            "duration_ms": total,
            "bytes_out": self.bytes_out,
            "client_disconnected": client_disconnected,
            "trace": self._trace(error_code or status, total),
        }
        self.spool.finish(record)
        if self.accepted:
            self._correct(usage.prompt + usage.completion)
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
        return {"candidates": call.plan.trace, "attempts": call.journal}

    def counted(self) -> tuple[Usage, str]:
        """What the provider said; else an estimate, if it took the request at all (F14)."""
        if self.usage is not None:
            return self.usage, "provider"
        if not self.accepted:
            return Usage(), "none"
        return Usage(prompt=self.call.body_bytes // BYTES_PER_TOKEN, completion=self.events), "estimated"

    def cost(self, usage: Usage) -> int | None:
        """Nano-dollars by the price that was known when the request was planned; None where none was. What the provider did
        not take costs nothing, not even what it asks for each request."""
        price = self.candidate.price
        if price is None:
            return None
        return price.cost(usage) if self.accepted or self.usage is not None else 0


def _status_of(error: ProviderError) -> str:
    if isinstance(error, Stalled):
        return "upstream_stalled"
    if isinstance(error, Interrupted):
        return "upstream_interrupted"
    return "error"
