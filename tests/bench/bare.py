"""The bare pass-through: an ASGI function on uvicorn that hands a request to the upstream with aiohttp, and nothing in between.

It is what Python costs before a gateway does anything. `UPSTREAM` in the environment says where the upstream is.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
UPSTREAM = os.environ.get("UPSTREAM", "")
HEADERS = {
    "Content-Type": "application/json",
    "Authorization": "Bearer upstream",
    "Accept-Encoding": "identity",
}


class PassThrough:
    """The ASGI application; its one connection pool lives as long as the server."""

    session: aiohttp.ClientSession

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        else:
            await self._pass(scope["path"], await _body(receive), send)

    async def _pass(self, path: str, body: bytes, send: Send) -> None:
        async with self.session.post(UPSTREAM + path, data=body, headers=HEADERS) as answer:
            headers = [(b"content-type", answer.headers.get("content-type", "").encode())]
            if answer.content_length is not None:
                headers.append((b"content-length", str(answer.content_length).encode()))
            await send({"type": "http.response.start", "status": answer.status, "headers": headers})
            async for piece in answer.content.iter_any():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        connector = aiohttp.TCPConnector(limit=0)
        cookies = aiohttp.DummyCookieJar()
        async with aiohttp.ClientSession(
            connector=connector, cookie_jar=cookies, auto_decompress=False
        ) as session:
            self.session = session
            await send({"type": "lifespan.startup.complete"})
            await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _body(receive: Receive) -> bytes:
    body = bytearray()
    while True:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body"):
            return bytes(body)


app = PassThrough()
