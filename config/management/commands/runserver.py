"""``manage.py runserver``: daphne with autoreload, for `make dev`. The server of every other day is `serve`."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from daphne.management.commands.runserver import Command as DaphneCommand

from proxy.gateway import GATEWAY

Application = Callable[[Any, Any, Any], Awaitable[None]]
ASKED_BY_MACHINES = {"/livez", "/readyz", "/metrics"}


class StartsGateway:
    """An ASGI application in front of another: daphne sends no lifespan, so the first request starts the gateway.

    A start that fails, as while the database is away, is tried again with the next request.
    """

    def __init__(self, application: Application, start: Callable[[], Awaitable[None]]) -> None:
        self._application = application
        self._start = start
        self._lock = asyncio.Lock()
        self._started = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async with self._lock:
            if not self._started:
                await self._start()
                self._started = True
        await self._application(scope, receive, send)


class Command(DaphneCommand):  # type: ignore[misc]  # daphne has no types
    def get_application(self, options: dict[str, Any]) -> Application:
        return StartsGateway(super().get_application(options), GATEWAY.start)

    def log_action(self, protocol: str, action: str, details: dict[str, Any]) -> None:
        """Every request but those that machines make again and again."""
        if details.get("path") not in ASKED_BY_MACHINES:
            super().log_action(protocol, action, details)
