"""How much of a body the control plane takes. Django writes a body of any size to the disk before anybody looks at it."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from django.conf import settings

from audit.api_errors import Problem
from audit.request_ids import request_id_from

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

MAX_OF_A_STRANGER = 16 * 1024
"""Bytes of a request that brings neither a token nor a cookie; a name and a password are shorter."""


class BodyLimit:
    """An ASGI application that answers 413 for a body above DATA_UPLOAD_MAX_MEMORY_SIZE, before it is read where its
    length was told; and 401 for what a stranger sends beyond a login."""

    def __init__(self, application: Callable[[Any, Receive, Any], Awaitable[None]]) -> None:
        self._application = application

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        known = b"authorization" in headers or b"cookie" in headers
        limit = settings.DATA_UPLOAD_MAX_MEMORY_SIZE if known else MAX_OF_A_STRANGER
        length = headers.get(b"content-length", b"0")
        if len(length) > 18 or int(length) > limit:
            await _refuse(headers, send, known=known)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            # To Django it is a caller who left in the middle of the body.
            return message if size <= limit else {"type": "http.disconnect"}

        await self._application(scope, counted, send)
        if size > limit:
            await _refuse(headers, send, known=known)


async def _refuse(headers: dict[bytes, bytes], send: Send, *, known: bool) -> None:
    request_id = request_id_from(headers.get(b"x-request-id", b"").decode("latin-1"))
    problem = Problem(413, "The body is too large.") if known else Problem(401, "Log in first.")
    body = json.dumps(problem.body(request_id)).encode()
    answer = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-content-type-options", b"nosniff"),
        (b"x-request-id", request_id.encode()),
    ]
    await send({"type": "http.response.start", "status": problem.status, "headers": answer})
    await send({"type": "http.response.body", "body": body})
