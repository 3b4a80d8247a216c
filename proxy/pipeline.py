"""The hot path of a request, as ordered steps; each step is explained where it lives.

Nothing here waits for anything but the caller's body, one Redis script when the key has limits, the provider,
and the database only where what was granted of a budget is not enough.
"""

from __future__ import annotations

import asyncio
import functools
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from django.conf import settings

from audit.strict_json import StrictJSONError, loads
from proxy import auth, budgets, keeping, relay, selection
from proxy.attempts import BYTES_PER_TOKEN, Call
from proxy.auth import Caller, RawHeaders
from proxy.budgets import NOTHING, Asked, Hold
from proxy.dialects import openai
from proxy.errors import ConfigurationUnavailable, InvalidApiKey, InvalidJson
from proxy.gateway import Gateway
from proxy.inflight import Running
from proxy.limits import Held
from proxy.needs import choices, completion_limit, needs_of
from proxy.relay import Sink
from proxy.resume import may_resume
from proxy.selection import Plan
from proxy.snapshot import Snapshot


class Request(Protocol):
    """What the pipeline needs of a transport. `left` watches for the caller's leaving while its block runs.

    resume: whether a broken stream is to be gone on with, where the request says so. key_name: set once the caller is known.
    """

    id: str
    headers: RawHeaders
    address: str
    length: int
    resume: bool | None
    key_name: str

    async def body(self) -> bytes: ...
    def left(self, running: Running) -> AbstractAsyncContextManager[None]: ...


async def chat(gateway: Gateway, request: Request, sink: Sink) -> None:
    """Serve one chat completion. Raises GatewayError or ProviderError, which the transport tells the caller."""
    caller = admit(gateway, request)
    gateway.overload.check(gateway.registry.running)
    running = gateway.registry.enter(caller, request.id)
    try:
        async with gateway.limits.hold(
            caller.scopes, member=request.id, tokens=request.length // BYTES_PER_TOKEN
        ) as held:
            body = await request.body()
            async with request.left(running):
                snapshot = gateway.watcher.snapshot
                call = prepare(gateway, snapshot, request, running, held, body)
                send = functools.partial(within_budget, gateway, snapshot, call)
                if caller.keeps:
                    await keeping.run(gateway, call, request.headers, sink, send)
                else:
                    await send(sink)
    except asyncio.CancelledError:
        if running.ending is None:
            raise
        # We ended it ourselves, so the task goes on; unless the caller is the one who left, it is told.
        running.task.uncancel()
        if (error := running.error()) is not None:
            raise error from None
    finally:
        gateway.registry.leave(running)


def admit(gateway: Gateway, request: Request) -> Caller:
    """401, then 403 by address; while the database is long away, 503, and an unknown key may exist after all."""
    watcher = gateway.watcher
    if not watcher.usable:
        raise ConfigurationUnavailable
    try:
        key = auth.presented_key(request.headers)
        caller = auth.authenticate(key, watcher.snapshot.callers, settings.PENSTOCK_PEPPERS)
    except InvalidApiKey:
        if watcher.fresh or not auth.well_formed(key):
            raise
        raise ConfigurationUnavailable from None
    request.key_name = caller.name
    auth.check_address(caller, request.address)
    return caller


def prepare(
    gateway: Gateway, snapshot: Snapshot, request: Request, running: Running, held: Held, body: bytes
) -> Call:
    """400, then 404 and 403 by model: the request understood, and its candidates in order."""
    try:
        chat = openai.chat_request(loads(body))
    except StrictJSONError as error:
        raise InvalidJson(str(error)) from error
    plan = selection.plan(
        snapshot,
        gateway.conditions(),
        running.caller,
        purpose="chat",
        model=chat.model,
        provider_id=chat.provider_id,
        needs=functools.partial(needs_of, chat.body),
        routes=gateway.routes,
    )
    resume = chat.stream and _resumes(request, running.caller, plan) and may_resume(chat.body)
    return Call(running, held, "chat", chat, len(body), plan, snapshot.version, resume)


async def within_budget(gateway: Gateway, snapshot: Snapshot, call: Call, sink: Sink) -> None:
    with await hold(gateway, snapshot, call) if snapshot.budgets else NOTHING:
        await relay.run(gateway, call, sink)


async def hold(gateway: Gateway, snapshot: Snapshot, call: Call) -> Hold:
    """402: what the request may cost is held until the block ends, and candidates that the budgets do not allow are left out."""
    body, plan = call.chat.body, call.plan
    asked = Asked(call.body_bytes, completion_limit(body), choices(body))
    call.hold = await budgets.hold(
        gateway.grants, snapshot, call.running.caller.budgets, plan.candidates, asked
    )
    call.plan = plan._replace(candidates=call.hold.candidates, trace=(*plan.trace, *call.hold.left_out))
    return call.hold


def _resumes(request: Request, caller: Caller, plan: Plan) -> bool:
    """Whether a stream that breaks is gone on with: the request's word, else the key's, else the configuration's."""
    said = (each for each in (request.resume, caller.resume, plan.resume) if each is not None)
    return next(said)
