"""One ASGI application, two planes: what applications call is Channels consumers, the rest is Django."""

from __future__ import annotations

import gc
import os
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

from channels.routing import ProtocolTypeRouter, URLRouter
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.urls import get_resolver

# WhiteNoise serves from the packages; it warns when the folder for collected files is missing.
settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
django_application = get_asgi_application()

from config.body_limit import BodyLimit
from proxy.consumers.operations import live, metrics, ready
from proxy.endpoints import busiest, http_routes, websocket_routes
from proxy.gateway import GATEWAY

Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

routes = ProtocolTypeRouter(
    {
        "http": URLRouter([*http_routes(GATEWAY, BodyLimit(django_application))]),
        "websocket": URLRouter([*websocket_routes(GATEWAY)]),
    }
)
BUSIEST = busiest(GATEWAY)
OPERATIONS = {"/livez": live, "/readyz": ready, "/metrics": metrics}


async def application(scope: dict[str, Any], receive: Receive, send: Send) -> None:
    """What is asked about the process itself is answered before any routing, so that nothing can delay it; so is what is asked
    all the time, since Channels' routers take 3 % of a request."""
    if scope["type"] == "http" and (consumer := BUSIEST.get(scope["path"])) is not None:
        await consumer(scope, receive, send)
    elif scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "http" and (answer := OPERATIONS.get(scope["path"].rstrip("/"))) is not None:
        await answer(GATEWAY, scope, send)
    else:
        await routes(scope, receive, send)


async def lifespan(receive: Receive, send: Send) -> None:
    """Build the snapshot, then accept; on the way out, close what was opened."""
    while True:
        message = await receive()
        if message["type"] == "lifespan.startup":
            try:
                await GATEWAY.start()
            except Exception as error:  # noqa: BLE001  # whatever it is, it is told in one line and nothing is served
                await send({"type": "lifespan.startup.failed", "message": f"{type(error).__name__}: {error}"})
                return
            load_the_control_plane()
            spare_the_collector()
            await send({"type": "lifespan.startup.complete"})
        else:
            await GATEWAY.stop()
            await send({"type": "lifespan.shutdown.complete"})
            return


def load_the_control_plane() -> None:
    """Django reads the URL conf, and with it all views, for the first request; in a thread beside streams that costs each of them."""
    _ = get_resolver().url_patterns


def spare_the_collector() -> None:
    """What is there by now stays for ever: without this the garbage collector walks half a million objects of Django for
    requests that leave no cycles behind, which was a third of a request's CPU time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 50, 100)
