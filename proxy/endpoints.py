"""The paths of the data plane. Each also answers under `/api`, and with or without a trailing slash."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from django.urls import URLPattern, re_path

from proxy.consumers.http import ChatConsumer, ModelsConsumer, NothingConsumer
from proxy.consumers.websocket import ChatSocket, NothingSocket
from proxy.gateway import Gateway

# Under /api/v1 the control plane has its own paths, so only the data plane's are named there.
NAMED = "completions|responses|embeddings|rerank|messages|images|audio|moderations"


def busiest(gateway: Gateway) -> dict[str, Callable[..., Any]]:
    """The paths that nearly all requests go to, as they are usually written: found by a look-up. `http_routes` has them, too."""
    chat = ChatConsumer.as_asgi(gateway=gateway)
    return {"/v1/chat/completions": chat, "/api/v1/chat/completions": chat}


def http_routes(gateway: Gateway, control_plane: Callable[..., Any]) -> list[URLPattern]:
    chat, models = ChatConsumer.as_asgi(gateway=gateway), ModelsConsumer.as_asgi(gateway=gateway)
    nothing = NothingConsumer.as_asgi(gateway=gateway)
    return [
        re_path(r"^(?:api/)?v1/chat/completions/?$", chat),
        re_path(r"^(?:api/)?v1/models(?:/(?P<model_id>.*))?$", models),
        re_path(rf"^(?:api/)?v1/(?:{NAMED})(?:/.*)?$", nothing),
        re_path(r"^v1(?:/.*)?$", nothing),
        re_path(r"", control_plane),
    ]


def websocket_routes(gateway: Gateway) -> list[URLPattern]:
    return [
        re_path(r"^(?:(?:api/)?v1/)?ws/chat/?$", ChatSocket.as_asgi(gateway=gateway)),
        re_path(r"^(?:api/)?v1(?:/.*)?$", NothingSocket.as_asgi(gateway=gateway)),
        # The control plane has no sockets, and asks nobody for a gateway key.
        re_path(r"", NothingSocket.as_asgi()),
    ]
