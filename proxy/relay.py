"""Carrying one request to a provider and its answer back, or an honest error.

A stream is committed to the caller at its first content, reasoning, tool call or finish event. Before that the next
candidate may be tried; after it, another may go on where the stream broke (`resume`), or whatever broke is told in the
stream, once, and nothing is made up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

from providers import upstream
from providers.errors import Interrupted, ProtocolError, ProviderError, Stalled
from providers.upstream import Reply
from providers.wire import Chat
from proxy import estimates, scopes
from proxy.attempts import BYTES_PER_TOKEN, Attempt, Call
from proxy.candidates import Candidate
from proxy.errors import BudgetExceeded, BudgetUnavailable, RateLimited
from proxy.gateway import Gateway
from proxy.journey import Journey
from proxy.limits import Held
from proxy.needs import choices
from proxy.outcomes import Noted
from proxy.patience import Patience
from proxy.reading import AnswerReader
from proxy.resume import Resumption

MAX_PLAIN_BYTES = 24 * 1024 * 1024
ENDING_SECONDS = 0.5
"""How long a finished stream is waited for, for its usage and its `[DONE]`."""


class Sink(Protocol):
    """Where an answer goes. `begin` once, then `send`; `end` carries the last bytes. length: of the whole body, where it is known.

    keep_alive: say between events that we are still there, where the transport does not say so itself.
    """

    @property
    def begun(self) -> bool: ...

    async def begin(self, attempt: Attempt, length: int | None = None) -> None: ...
    async def send(self, data: bytes) -> None: ...
    async def end(self, data: bytes) -> None: ...
    async def keep_alive(self) -> None: ...


async def run(gateway: Gateway, call: Call, sink: Sink) -> None:
    """Try the candidates until one answers. Raises the error to be told; what was recorded is recorded."""
    resumption = Resumption(call.chat.body) if call.resume else None
    with Journey(call.plan.candidates, gateway.retries) as journey:
        while (candidate := await _next(journey, sink, resumption)) is not None:
            if journey.dials > 1 and not await _affordable(gateway, call):
                break
            try:
                async with _place(gateway, call, candidate) as place:
                    with (
                        Attempt(call, candidate, journey.dials, gateway.spool, place) as attempt,
                        Noted(gateway, attempt),
                    ):
                        if call.chat.stream:
                            await _stream(gateway, attempt, sink, resumption)
                        else:
                            await _plain(gateway, attempt, sink)
                return
            except RateLimited as limited:
                call.passed_over(candidate)
                journey.passed_over(candidate, limited)
            except ProviderError as error:
                # It may be kept, and must not hold the frames it came through: they hold us, and whole answers.
                error.__traceback__ = error.__cause__ = error.__context__ = None
                if not sink.begun:
                    journey.failed(candidate, error)
                elif resumption is None:
                    raise
                elif resumption.broken(candidate.full_name, error):
                    journey.once_more(candidate)
                else:
                    journey.failed(candidate, error, committed=True)
        raise (resumption and resumption.broke) or journey.verdict()


async def _affordable(gateway: Gateway, call: Call) -> bool:
    """Whether the budgets have as much once more as is held of them; attempts before may have cost all of it."""
    try:
        await call.hold.again(gateway.grants)
    except (BudgetExceeded, BudgetUnavailable):
        return False
    return True


def _place(gateway: Gateway, call: Call, candidate: Candidate) -> AbstractAsyncContextManager[Held]:
    """A place within the limits of the provider's key, where it has any. Entering raises RateLimited."""
    return gateway.limits.hold(
        scopes.of_credential(candidate.credential),
        member=call.running.request_id,
        tokens=call.body_bytes // BYTES_PER_TOKEN,
        alone=call.held.alone,
    )


async def _next(journey: Journey, sink: Sink, resumption: Resumption | None) -> Candidate | None:
    """Anybody while the caller has nothing of an answer; then who can go on with it."""
    if resumption is None or not sink.begun:
        return await journey.next()
    return await journey.next(lambda each: bool(resumption.ways(_chat(each), each.full_name)))


async def _plain(gateway: Gateway, attempt: Attempt, sink: Sink) -> None:
    """A whole answer: nothing is forwarded before all of it is there and recorded."""
    chat, limit = _chat(attempt.candidate), attempt.candidate.upstream.endpoint.timeouts.request
    task = attempt.call.running.task
    with Patience(task, first=limit, idle=limit, total=limit, keep_alive=sink.keep_alive):
        reply = await _dial(gateway, attempt, attempt.call.chat.body)
        try:
            await _judge(reply, attempt)
            body = await upstream.read_bounded(reply, MAX_PLAIN_BYTES)
        finally:
            reply.close()
    completion = chat.read_completion(body)
    attempt.usage, attempt.finish_reason = completion.usage, completion.finish_reason
    if completion.usage is None:
        attempt.tokens = estimates.of_answer(body)
    attempt.bytes_out = len(body)
    attempt.settle("success", http_status=reply.status)
    await sink.begin(attempt, len(body))
    await sink.end(body)


async def _stream(gateway: Gateway, attempt: Attempt, sink: Sink, resumption: Resumption | None) -> None:
    timeouts = attempt.candidate.upstream.endpoint.timeouts
    body, reader = _question(attempt, resumption if sink.begun else None)
    patience = Patience(
        attempt.call.running.task, first=timeouts.first_token, idle=timeouts.idle, total=timeouts.stream,
        keep_alive=sink.keep_alive, committed=sink.begun,
    )  # fmt: skip
    try:
        with patience:
            reply = await _dial(gateway, attempt, body)
            try:
                await _judge(reply, attempt, stream=True)
                await _pump(reply, reader, attempt, sink, patience, resumption)
                if not reader.done:
                    await _ending(reply, reader, patience)
            finally:
                reply.close()
    finally:
        attempt.usage, attempt.tokens = (
            reader.usage,
            estimates.of_stream(reader.events, reader.text_bytes),
        )
        attempt.finish_reason = reader.finish_reason if reader.done else None
    attempt.settle("success", http_status=reply.status)
    if not sink.begun:
        await sink.begin(attempt)
    await sink.end(reader.last_bytes())


def _question(attempt: Attempt, resumption: Resumption | None) -> tuple[Mapping[str, Any], AnswerReader]:
    """What is asked, and who reads the answer: the caller's own request, or how a broken answer goes on."""
    request, chat = attempt.call.chat, _chat(attempt.candidate)
    if resumption is None:
        return request.body, AnswerReader(
            chat, choices=choices(request.body), wants_usage=request.wants_usage
        )
    way = resumption.ways(chat, attempt.candidate.full_name)[0]
    return resumption.body(chat, way, attempt.candidate.full_name), resumption.reader(
        chat, way, wants_usage=request.wants_usage
    )


async def _pump(
    reply: Reply,
    reader: AnswerReader,
    attempt: Attempt,
    sink: Sink,
    patience: Patience,
    resumption: Resumption | None,
) -> None:
    """Forward until the answer is complete; raises what went wrong, after forwarding what came before it."""
    while not (reader.complete or reader.failure or reader.done):
        data = await reply.read()
        patience.progress()
        out = reader.feed(data) if data else reader.ended()
        if reader.begun and attempt.ttft_ms is None:
            attempt.first_token()
            patience.begun()
        if out:
            await _forward(out, attempt, sink, patience, resumption)
        if not data:
            break
    if reader.done and not reader.complete and reader.failure is None:
        reader.ended()
    if reader.failure is not None:
        raise _in_stream(reader.failure) if sink.begun and reader.begun else reader.failure


async def _forward(
    out: bytes, attempt: Attempt, sink: Sink, patience: Patience, resumption: Resumption | None
) -> None:
    """Give the caller these events; what they are is kept where the stream may have to be gone on with."""
    if not sink.begun:
        await sink.begin(attempt)
    attempt.bytes_out += len(out)
    patience.sending = True
    try:
        await sink.send(out)
    except BaseException:
        if resumption is not None:
            resumption.spoil()
        raise
    patience.forwarded()
    if resumption is not None:
        resumption.add(out)


async def _ending(reply: Reply, reader: AnswerReader, patience: Patience) -> None:
    """Whatever follows the finish reason, the stream is complete: usage and `[DONE]` are welcome, nothing else matters."""
    patience.finishing(ENDING_SECONDS)
    with contextlib.suppress(ProviderError):
        while not (reader.done or reader.failure) and (data := await reply.read()):
            reader.feed(data)


async def _dial(gateway: Gateway, attempt: Attempt, body: Mapping[str, Any]) -> Reply:
    candidate = attempt.candidate
    endpoint = candidate.upstream.endpoint
    request = _chat(candidate).request(endpoint, body, candidate.model, attempt.call.chat.stream)
    return await upstream.stream(
        gateway.pools,
        endpoint,
        request,
        credential=candidate.credential,
        dial=attempt.dial,
        request_id=attempt.call.running.request_id,
    )


async def _judge(reply: Reply, attempt: Attempt, *, stream: bool = False) -> None:
    """Raises what a status or a content type means; notes that the request was accepted."""
    kind = attempt.candidate.upstream.kind
    if not 200 <= reply.status < 300:
        raise kind.classify(reply.status, reply.headers, await reply.read())
    attempt.accepted = True
    if stream and "text/event-stream" not in reply.headers.get("content-type", "").lower():
        # A JSON body in place of a stream is an error inside a 200, or an upstream that does not stream.
        _chat(attempt.candidate).read_completion(await upstream.read_beginning(reply))
        raise ProtocolError(detail="a whole body came in place of a stream")


def _chat(candidate: Candidate) -> Chat:
    chat = candidate.upstream.kind.chat
    assert chat is not None, "selection only proposes upstreams that can chat"
    return chat


def _in_stream(error: ProviderError) -> ProviderError:
    """What broke a committed stream, in the words for that."""
    return error if isinstance(error, Interrupted | Stalled) else Interrupted(detail=error.detail)
