"""Carrying one request to a provider and its answer back, or an honest error.

A stream is committed to the caller at its first content, reasoning, tool call or finish event. Before that the next
candidate may be tried; after it, whatever breaks is told in the stream, once, and nothing is made up.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from providers import upstream
from providers.errors import (
    CredentialRejected,
    CredentialUndecryptable,
    Interrupted,
    ProtocolError,
    ProviderError,
    Stalled,
    UpstreamModelNotFound,
    UpstreamRateLimited,
    UpstreamTimeout,
)
from providers.upstream import Reply
from providers.wire import Chat
from proxy.attempts import Attempt, Call
from proxy.gateway import Gateway
from proxy.reading import AnswerReader
from proxy.selection import Candidate

MAX_DIALS = 3
MAX_PLAIN_BYTES = 24 * 1024 * 1024
MAX_ERROR_BYTES = 64 * 1024
ENDING_SECONDS = 0.5
"""How long a finished stream is waited for, for its usage and its `[DONE]`."""


class Sink(Protocol):
    """Where an answer goes. `begin` once, then `send`; `end` carries the last bytes."""

    begun: bool

    async def begin(self, attempt: Attempt) -> None: ...
    async def send(self, data: bytes) -> None: ...
    async def end(self, data: bytes) -> None: ...


class Patience:
    """The deadlines of one stream with one timer, which looks at the last progress only when it fires."""

    def __init__(self, *, first: float, idle: float, total: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._limit, self._idle = first, idle
        self._last = self._loop.time()
        self._end = self._last + total
        self._timer: asyncio.TimerHandle | None = None
        self._scope: asyncio.Timeout | None = None
        self._begun = False
        self.sending = False

    def progress(self) -> None:
        self._last = self._loop.time()

    def begun(self) -> None:
        """From now on it is the silence between events that counts."""
        self._begun, self._limit = True, self._idle
        self.progress()
        self._arm()

    def _due(self) -> float:
        return min(self._last + self._limit, self._end)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(self._due(), self._look)

    def _look(self) -> None:
        if self.sending:
            # It is the caller who is slow, and the server has a deadline of its own for that.
            self.progress()
        now = self._loop.time()
        if self._due() <= now and self._scope is not None:
            self._scope.reschedule(now)
        else:
            self._arm()

    def _error(self) -> ProviderError:
        if not self._begun:
            return UpstreamTimeout("The provider did not begin to answer in time.")
        if self._loop.time() >= self._end:
            return Interrupted("The stream took longer than is allowed.")
        return Stalled()

    @asynccontextmanager
    async def scope(self) -> AsyncIterator[None]:
        """Raises UpstreamTimeout, Stalled or Interrupted when a deadline passes inside."""
        try:
            async with asyncio.timeout(None) as self._scope:
                self._arm()
                yield
        except TimeoutError as error:
            raise self._error() from error
        finally:
            self._scope = None
            if self._timer is not None:
                self._timer.cancel()


async def run(gateway: Gateway, call: Call, sink: Sink) -> None:
    """Try the candidates in order until one answers. Raises the error to be told; what was recorded is recorded."""
    failures: list[ProviderError] = []
    for number, candidate in enumerate(call.plan.candidates[:MAX_DIALS], 1):
        try:
            with Attempt(call, candidate, number, gateway.spool) as attempt:
                gateway.breakers.trying(candidate.upstream.id)
                await (_stream if call.chat.stream else _plain)(gateway, attempt, sink)
            _note_success(gateway, candidate)
            return
        except ProviderError as error:
            _note_failure(gateway, candidate, error)
            failures.append(error)
            if sink.begun or not error.failover:
                raise
    raise _verdict(failures)


async def _plain(gateway: Gateway, attempt: Attempt, sink: Sink) -> None:
    """A whole answer: nothing is forwarded before all of it is there and recorded."""
    candidate, chat = attempt.candidate, _chat(attempt.candidate)
    try:
        async with asyncio.timeout(candidate.upstream.endpoint.timeouts.request):
            reply = await _dial(gateway, attempt)
            try:
                await _judge(reply, attempt)
                body = await upstream.read_bounded(reply, MAX_PLAIN_BYTES)
            finally:
                reply.close()
    except TimeoutError as error:
        raise UpstreamTimeout from error
    attempt.usage = chat.read_completion(body).usage
    attempt.bytes_out = len(body)
    attempt.settle("success", http_status=reply.status)
    await sink.begin(attempt)
    await sink.end(body)


async def _stream(gateway: Gateway, attempt: Attempt, sink: Sink) -> None:
    timeouts = attempt.candidate.upstream.endpoint.timeouts
    call = attempt.call
    reader = AnswerReader(
        _chat(attempt.candidate), choices=_choices(call.chat.body), wants_usage=call.chat.wants_usage
    )
    patience = Patience(first=timeouts.first_token, idle=timeouts.idle, total=timeouts.stream)
    try:
        async with patience.scope():
            reply = await _dial(gateway, attempt)
            try:
                await _judge(reply, attempt, stream=True)
                await _pump(reply, reader, attempt, sink, patience)
            finally:
                reply.close()
    finally:
        attempt.usage, attempt.events = reader.usage, reader.events
    attempt.settle("success", http_status=reply.status)
    if not sink.begun:
        await sink.begin(attempt)
    await sink.end(reader.last_bytes())


async def _pump(reply: Reply, reader: AnswerReader, attempt: Attempt, sink: Sink, patience: Patience) -> None:
    """Forward until the answer is complete; raises what went wrong, after forwarding what came before it."""
    while not (reader.complete or reader.failure or reader.done):
        data = await reply.read()
        patience.progress()
        out = reader.feed(data) if data else reader.ended()
        if reader.begun and attempt.ttft_ms is None:
            attempt.first_token()
            patience.begun()
        if out:
            if not sink.begun:
                await sink.begin(attempt)
            attempt.bytes_out += len(out)
            patience.sending = True
            await sink.send(out)
            patience.sending = False
        if not data:
            break
    if reader.done and not reader.complete and reader.failure is None:
        reader.ended()
    if reader.failure is not None:
        raise _in_stream(reader.failure) if sink.begun else reader.failure
    if not reader.done:
        await _ending(reply, reader)


async def _ending(reply: Reply, reader: AnswerReader) -> None:
    """Whatever follows the finish reason, the stream is complete: usage and `[DONE]` are welcome, nothing else matters."""
    try:
        async with asyncio.timeout(ENDING_SECONDS):
            while not reader.done and (data := await reply.read()):
                reader.feed(data)
    except (TimeoutError, ProviderError):
        return


async def _dial(gateway: Gateway, attempt: Attempt) -> Reply:
    candidate = attempt.candidate
    endpoint = candidate.upstream.endpoint
    call = attempt.call
    request = _chat(candidate).request(endpoint, call.chat.body, candidate.model, call.chat.stream)
    return await upstream.stream(gateway.sessions, endpoint, request, credential=candidate.credential)


async def _judge(reply: Reply, attempt: Attempt, *, stream: bool = False) -> None:
    """Raises what a status or a content type means; notes that the request was accepted."""
    kind = attempt.candidate.upstream.kind
    if not 200 <= reply.status < 300:
        raise kind.classify(reply.status, reply.headers, await _beginning(reply))
    attempt.accepted = True
    if stream and "text/event-stream" not in reply.headers.get("content-type", "").lower():
        # A JSON body in place of a stream is an error inside a 200, or an upstream that does not stream.
        _chat(attempt.candidate).read_completion(await _beginning(reply))
        raise ProtocolError(detail="a whole body came in place of a stream")


async def _beginning(reply: Reply) -> bytes:
    """As much of an error's body as there is and is useful; that it breaks off changes nothing about the error."""
    body = b""
    with contextlib.suppress(ProviderError):
        while len(body) < MAX_ERROR_BYTES and (part := await reply.read()):
            body += part
    return body


def _chat(candidate: Candidate) -> Chat:
    chat = candidate.upstream.kind.chat
    assert chat is not None, "selection only proposes upstreams that can chat"
    return chat


def _choices(body: object) -> int:
    n = body.get("n") if isinstance(body, dict) else None
    return n if isinstance(n, int) and not isinstance(n, bool) and n > 1 else 1


def _in_stream(error: ProviderError) -> ProviderError:
    """What broke a committed stream, in the words for that."""
    return error if isinstance(error, Interrupted | Stalled) else Interrupted(detail=error.detail)


def _note_success(gateway: Gateway, candidate: Candidate) -> None:
    gateway.breakers.succeeded(candidate.upstream.id)
    if candidate.credential and candidate.credential.key_id in gateway.watcher.weather.rejected:
        gateway.watcher.accepted(candidate.credential.key_id)


def _note_failure(gateway: Gateway, candidate: Candidate, error: ProviderError) -> None:
    if error.blame == "provider":
        gateway.breakers.failed(candidate.upstream.id)
        gateway.watcher.suspect(candidate.upstream.id)
    elif isinstance(error, CredentialRejected) and candidate.credential:
        gateway.watcher.rejected(candidate.credential.key_id)
    elif isinstance(error, CredentialUndecryptable) and candidate.credential:
        gateway.watcher.undecryptable(candidate.credential.key_id)


def _verdict(failures: list[ProviderError]) -> ProviderError:
    """One error for all candidates: 429 and 404 only when every one said so, else the last that is neither."""
    others = [
        error for error in failures if not isinstance(error, UpstreamRateLimited | UpstreamModelNotFound)
    ]
    if others:
        return others[-1]
    limited = [error for error in failures if isinstance(error, UpstreamRateLimited)]
    return (limited or failures)[-1]
