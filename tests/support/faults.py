"""Everything an upstream can do wrong, each as a behaviour for `Upstream`.

`k` is always a number of content chunks that are sent well before the fault. A test may also ask by model name: see `named`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import struct
import zlib
from collections.abc import Awaitable, Callable

from tests.support.answers import (
    DONE,
    JSON,
    LEAKY_HEADERS,
    SSE,
    Answer,
    begin_stream,
    error_body,
    event,
    ok,
    raw,
    send_content,
    words,
)
from tests.support.http_server import BLOCK, UNTIL_CLOSE, Behaviour, Exchange

GIB = 1024**3
LONG = Answer(texts=words(60))

# -- before or instead of the head ------------------------------------------------------------------------------------


def reset_before_headers() -> Behaviour:
    """Take the request, then break the connection with a reset."""
    return _ending(Exchange.reset)


def hang_up_before_headers() -> Behaviour:
    """Take the request, then close without a word."""
    return _ending(Exchange.hang_up)


def silence() -> Behaviour:
    """Take the request and never answer."""
    return _ending(Exchange.silence)


def flood_of_1xx(count: int = 10_000) -> Behaviour:
    """So many interim answers before the real one."""

    async def behave(exchange: Exchange) -> None:
        for _ in range(count):
            await exchange.send(b"HTTP/1.1 102 Processing\r\n\r\n")
        await ok()(exchange)

    return behave


def huge_headers(size: int = 1024 * 1024) -> Behaviour:
    """One response header of so many bytes."""
    return ok(headers={"X-Huge": "h" * size})


def not_http() -> Behaviour:
    """Binary noise where the status line should be."""

    async def behave(exchange: Exchange) -> None:
        await exchange.send(bytes(range(256)) * 4 + b"\r\n\r\n")

    return behave


def redirect(code: int, location: str) -> Behaviour:
    return raw(b"", code=code, headers={"Location": location})


# -- instead of the body -----------------------------------------------------------------------------------------------


def headers_then_silence() -> Behaviour:
    """A stream's head at once, then nothing, not even the role."""

    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, SSE)
        await exchange.silence()

    return behave


def late_first_token(seconds: float) -> Behaviour:
    """Head and role at once, the first content after so many seconds."""
    return ok(first_after=seconds)


def html() -> Behaviour:
    """A web page with status 200, as a captive portal or a wrong base URL gives."""
    return raw(
        b"<!doctype html><title>Welcome</title><h1>It works!</h1>", headers={"Content-Type": "text/html"}
    )


def noise() -> Behaviour:
    """Bytes that are neither JSON nor UTF-8, announced as what was asked for."""

    async def behave(exchange: Exchange) -> None:
        await exchange.answer(200, bytes(range(256)) * 16, SSE if exchange.streamed else JSON)

    return behave


def wrong_content_type() -> Behaviour:
    """A good answer announced as plain text."""
    return ok(headers={"Content-Type": "text/plain"})


def empty() -> Behaviour:
    """200 and nothing: no event, no JSON."""

    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, SSE if exchange.streamed else JSON)
        await exchange.end()

    return behave


def done_first() -> Behaviour:
    """A stream whose only event is [DONE]."""
    return _stream_of([DONE])


def error_in_200(k: int = 0) -> Behaviour:
    """Status 200, then an error as the first event or after k chunks; as a JSON body when not streamed."""
    body = error_body("the model runner crashed", 500, "server_error")

    async def behave(exchange: Exchange) -> None:
        if not exchange.streamed:
            await exchange.answer(200, json.dumps(body).encode(), JSON)
            return
        if k:
            await begin_stream(exchange, LONG)
            await send_content(exchange, LONG, chunks=k)
        else:
            await exchange.head(200, SSE)
        await exchange.body(event(body))
        await exchange.end()

    return behave


def cut_json(*, reset: bool = False) -> Behaviour:
    """Half of a JSON body, then the connection ends although a length was announced."""

    async def behave(exchange: Exchange) -> None:
        body = json.dumps(Answer().whole(exchange.request)).encode()
        await exchange.head(200, JSON, length=len(body))
        await exchange.body(body[: len(body) // 2])
        await (exchange.reset() if reset else exchange.hang_up())

    return behave


def huge_line(size: int = GIB) -> Behaviour:
    """A stream that is one line without an end; made as it is sent, so it costs us no memory."""
    return _huge(SSE, b'data: {"choices":[{"delta":{"content":"', size)


def huge_json(size: int = GIB) -> Behaviour:
    """A JSON body that is one very long string."""
    return _huge(JSON, b'{"choices":[{"message":{"content":"', size)


def gzip_bomb(mebibytes: int = 256) -> Behaviour:
    """A small body, with `Content-Encoding: gzip` that nobody asked for, that unpacks to so many MiB."""

    async def behave(exchange: Exchange) -> None:
        body = _bomb(mebibytes)
        await exchange.answer(200, body, {**(SSE if exchange.streamed else JSON), "Content-Encoding": "gzip"})

    return behave


def leaky() -> Behaviour:
    """A good answer with headers that are nobody else's business (LEAKY_HEADERS)."""
    return ok(headers=LEAKY_HEADERS)


# -- in the middle of a stream -----------------------------------------------------------------------------------------


def reset_after(k: int) -> Behaviour:
    """A reset after k chunks."""
    return _breaking(k, Exchange.reset)


def unterminated_after(k: int) -> Behaviour:
    """The connection closes after k chunks, without the last chunk that HTTP asks for."""
    return _breaking(k, Exchange.hang_up)


def closed_after(k: int) -> Behaviour:
    """The same in a body that lasts until the connection closes: good HTTP, and yet only a part of the answer."""
    return _breaking(k, Exchange.hang_up, length=UNTIL_CLOSE)


def ended_after(k: int) -> Behaviour:
    """The body ends well after k chunks, but without a finish reason and [DONE]."""
    return _breaking(k, Exchange.end)


def stall_after(k: int) -> Behaviour:
    """Nothing more after k chunks; the connection stays open."""
    return _breaking(k, Exchange.silence)


def finished_then(ending: Callable[[Exchange], Awaitable[None]] = Exchange.reset) -> Behaviour:
    """A whole stream up to its finish reason, then a reset (or another ending) instead of [DONE]."""

    async def behave(exchange: Exchange) -> None:
        answer = Answer(done=False)
        await begin_stream(exchange, answer)
        await send_content(exchange, answer)
        for data in answer.closing(exchange.request):
            await exchange.body(data)
        await ending(exchange)

    return behave


def garbage_event(k: int, garbage: bytes = b'data: {"choices": [oops\n\n') -> Behaviour:
    """One event that is no JSON after k chunks; the rest of the stream is good."""

    async def behave(exchange: Exchange) -> None:
        answer = Answer(texts=words(k + 5))
        await begin_stream(exchange, answer)
        for number, data in enumerate(answer.content(exchange.request)):
            if number == k:
                await exchange.body(garbage)
            await exchange.chunk(data)
        for data in answer.closing(exchange.request):
            await exchange.body(data)
        await exchange.end()

    return behave


def binary_event(k: int = 2) -> Behaviour:
    return garbage_event(k, b"data: \x00\x01\xfe\xff\x80\n\n")


def bad_utf8(k: int = 2) -> Behaviour:
    """An event whose text is not UTF-8: a lone continuation byte and a cut character."""
    return garbage_event(k, b'data: {"choices":[{"index":0,"delta":{"content":"\x80\xe2\x82"}}]}\n\n')


def every_byte(
    texts: tuple[str, ...] = ("na\u00efve ", "\u6c34\u8def ", "\U0001f4a7", "\u2028"),
) -> Behaviour:
    """A good stream with characters of two to four bytes, each byte sent on its own."""
    return ok(texts=texts, cut=1)


def drip(seconds: float, count: int = 20) -> Behaviour:
    """A good stream, one chunk every so many seconds: slow, and legal."""
    return ok(chunks=count, delay=seconds)


def byte_drip(seconds: float) -> Behaviour:
    """A good answer sent one byte at a time, with a pause after each."""

    async def behave(exchange: Exchange) -> None:
        exchange.pause = seconds
        await ok(cut=1)(exchange)

    return behave


def no_done() -> Behaviour:
    """A complete stream without [DONE]."""
    return ok(done=False)


# -- between requests --------------------------------------------------------------------------------------------------


def close_after_answer(*, after: float = 0.0, reset: bool = False, say_so: bool = False) -> Behaviour:
    """A good answer, then the connection closes although it was promised to stay: the race of every connection pool.

    after: seconds between. say_so: announce it with `Connection: close`, as a well-behaved server does.
    """

    async def behave(exchange: Exchange) -> None:
        await ok(headers={"Connection": "close"} if say_so else None)(exchange)
        await asyncio.sleep(after)
        await (exchange.reset() if reset else exchange.hang_up())

    return behave


def closes_reused(first: Behaviour | None = None) -> Behaviour:
    """A good answer to the first request of a connection; a second one on it is answered with a close, without a byte."""
    seen: set[int] = set()

    async def behave(exchange: Exchange) -> None:
        if exchange.request.connection in seen:
            await exchange.hang_up()
            return
        seen.add(exchange.request.connection)
        await (first or ok())(exchange)

    return behave


# -- parts -------------------------------------------------------------------------------------------------------------


def _ending(ending: Callable[[Exchange], Awaitable[None]]) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await ending(exchange)

    return behave


def _stream_of(pieces: list[bytes]) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, SSE)
        for piece in pieces:
            await exchange.body(piece)
        await exchange.end()

    return behave


def _breaking(
    k: int, ending: Callable[[Exchange], Awaitable[None]], *, length: int | None = None
) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await begin_stream(exchange, LONG, length=length)
        await send_content(exchange, LONG, chunks=k)
        await ending(exchange)

    return behave


def _huge(headers: dict[str, str], start: bytes, size: int) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, headers)
        await exchange.body(start)
        block = b"x" * BLOCK
        for _ in range(size // BLOCK):
            await exchange.body(block)
        await exchange.end()

    return behave


@functools.cache
def _bomb(mebibytes: int) -> bytes:
    """Zeros as gzip. After a full flush the packed form of the same MiB repeats, so only one MiB is ever packed."""
    zeros = bytes(1024 * 1024)
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    packed = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 0
    for _ in range(mebibytes):
        checksum = zlib.crc32(zeros, checksum)
    end = packer.flush(zlib.Z_FINISH) + struct.pack("<II", checksum, mebibytes * len(zeros) & 0xFFFFFFFF)
    return b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff" + packed * mebibytes + end
