"""Requests of keys that keep something: answers in the cache, or what was said. All others go past this (`pipeline`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from proxy import cache, texts
from proxy.attempts import Attempt, Call
from proxy.auth import RawHeaders
from proxy.cache import Found
from proxy.copies import Copy
from proxy.gateway import Gateway
from proxy.relay import Sink

Send = Callable[[Sink], Awaitable[None]]
"""Has the request answered by a provider."""


async def run(gateway: Gateway, call: Call, headers: RawHeaders, sink: Sink, send: Send) -> None:
    """As `send`, but answered from the cache where that has the answer, and with a copy for those who keep one.

    Two that ask the same at the same time both go to a provider, and the later answer stays.
    """
    caller = call.running.caller
    slot, found = None, None
    if caller.cache_seconds is not None:
        slot = cache.slot_of(call, headers)
        found = await gateway.cache.find(slot, call)
        call.cache = "miss" if found is None else "hit"
    copy = Copy(
        sink,
        most_bytes=cache.MAX_ANSWER_BYTES if slot is not None and found is None else 0,
        most_text=texts.MAX_TEXT_BYTES if caller.record_text else 0,
    )
    try:
        if found is not None:
            await _replay(gateway, call, found, copy)
        else:
            await send(copy)
            _keep(gateway, call, slot, copy)
    finally:
        if caller.record_text and call.last:
            texts.keep(gateway.spool, call.last, call.chat.body, copy.text)


async def _replay(gateway: Gateway, call: Call, found: Found, sink: Sink) -> None:
    """Send what was kept. It is an attempt at nobody: recorded with the tokens of the original, and free."""
    with Attempt(call, found.candidate, 0, gateway.spool) as attempt:
        attempt.usage, attempt.tokens_source = found.usage, found.source
        attempt.accepted = True
        attempt.bytes_out = len(found.body)
        attempt.settle("success")
    await sink.begin(attempt, None if call.chat.stream else len(found.body))
    await sink.end(found.body)


def _keep(gateway: Gateway, call: Call, slot: cache.Slot | None, copy: Copy) -> None:
    """An answer of one attempt alone: one that was gone on with by another is not what would be given again."""
    body = copy.whole
    if slot is not None and body is not None and copy.first is not None and copy.first.id == call.last:
        gateway.cache.keep(slot, copy.first, body)
