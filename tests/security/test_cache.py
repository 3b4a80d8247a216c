"""R55: nothing that anybody answers may be kept by a cache, and no path answers 500."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest
from django.urls import URLPattern, URLResolver, get_resolver

from tests.support.gateway import Gateway
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

METHODS = ("GET", "POST", "OPTIONS")
DATA_PLANE = [
    "/v1/models",
    "/v1/models/tiny",
    "/v1/models/%ff",
    "/v1/chat/completions",
    "/v1/embeddings",
    "/v1/messages",
    "/v1/anything",
    "/v1/%ff",
    "/api/v1/models",
    "/api/v1/chat/completions",
    "/livez",
    "/readyz",
    "/metrics",
    "/ws/chat",
    "/v1/ws/chat",
]
OTHERS = [
    "/",
    "/nothing",
    "/%ff",
    "/api",
    "/api/nothing",
    "/api/v1/%ff",
    "/favicon.ico",
    "/admin/x",
    "/admin",
]


def registered() -> list[str]:
    """A path for every pattern that Django knows, its arguments filled in with 1."""

    def walk(patterns: list[URLPattern | URLResolver], prefix: str) -> Iterator[str]:
        for each in patterns:
            text = prefix + str(each.pattern)
            if isinstance(each, URLResolver):
                yield from walk(each.url_patterns, text)
            else:
                yield text

    return sorted({"/" + plain(text) for text in walk(get_resolver().url_patterns, "")})


def plain(pattern: str) -> str:
    """A pattern as a path: what it leaves open becomes 1."""
    import re

    text = re.sub(r"<[^>]+>(?![^)]*\))", "1", pattern.replace("(?:v1/)?", "v1/"))
    text = re.sub(r"\(\?P<\w+>(?:[^()]|\([^()]*\))*\)", "1", text)
    text = re.sub(r"\(\?:[^()]*\)\??|\(\.\*\)\$?", "1", text)
    return (
        text.replace("/?", "/")
        .replace("\\", "")
        .replace("^", "")
        .replace("$", "")
        .replace("\\Z", "")
        .replace("Z", "")
    )


@pytest.mark.parametrize("who", ["application", "administrator", "session", "stranger"])
def test_r55_no_answer_of_either_plane_may_be_cached(plain: Gateway, root: httpx.Client, who: str) -> None:
    # Of the console, whoever has a gateway key sees what a stranger sees.
    paths = [*DATA_PLANE, *OTHERS, *(registered() if who != "application" else ())]
    assert len(paths) > (60 if who != "application" else 20)
    with Upstream() as upstream, plain.client() as client:
        if who == "application":
            key = plain.provide(f"{upstream.url}/v1", slug="cached", active=False)
            client.headers["Authorization"] = f"Bearer {key}"
        elif who == "administrator":
            client.headers.update(root.headers)
        elif who == "session":
            log_in_to_admin(client)
        for path in paths:
            for method in METHODS:
                if who in {"administrator", "session"} and method == "POST":
                    continue
                answer = client.request(method, path)
                # 503 is an honest answer: no provider here has a key that could be used.
                assert answer.status_code < 500 or answer.status_code == 503, (
                    method,
                    path,
                    answer.text[:300],
                )
                assert "no-store" in answer.headers.get("cache-control", ""), (method, path)


def log_in_to_admin(client: httpx.Client) -> None:
    from tests.security.conftest import PASSWORD

    client.get("/admin/login/")
    form = {"username": "root", "password": PASSWORD, "csrfmiddlewaretoken": client.cookies["csrftoken"]}
    assert client.post("/admin/login/", data=form).status_code == 302
