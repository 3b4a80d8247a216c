"""The data plane in this process, over real sockets and without a database: its configuration is made by hand.

The server, the consumers and everything below them are the real ones; only the watcher, which would read the database, is
told what to say. For the whole product see `tests.support.gateway`.
"""

from __future__ import annotations

import asyncio
import socket
import time
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import httpx
from channels.routing import ProtocolTypeRouter, URLRouter

from config.connection import Limits as ServerLimits
from config.server import Config, Server
from providers import adapters, crypto
from providers.crypto import Keyring, aad_for
from providers.wire import Credential, Endpoint, Quota, Timeouts, origin_of
from proxy import keys
from proxy.auth import Caller
from proxy.endpoints import http_routes, websocket_routes
from proxy.gateway import Gateway
from proxy.inflight import Registry
from proxy.needs import ModelFacts
from proxy.price_book import FOREVER, Dated, Override, PriceBook
from proxy.pricing import Price
from proxy.segments import read
from proxy.snapshot import Choice, Snapshot, Upstream
from proxy.strategies import Node, Route
from proxy.watcher import Watcher
from proxy.weather import Weather
from tests.support.ports import LOOPBACK
from tests.support.upstream import LoopThread

PEPPERS = {1: b"pepper" * 8}
QUICK = Timeouts(connect=1.0, first_token=1.0, idle=1.0, stream=20.0, request=5.0)


class ToldWatcher(Watcher):
    """A watcher that reads nothing: tests put the snapshot and the weather there."""

    def start(self) -> None:
        self.answered_at = self._clock()

    def stop(self) -> None:
        return

    @property
    def silence(self) -> float:
        return self.told_silence

    told_silence = 0.0


class Control:
    """What stands in for Django at the end of the routes."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 299, "headers": []})
        await send({"type": "http.response.body", "body": b"control plane"})


class House:
    """A running data plane. `provide` upstreams, `issue` a key, then talk to `url`; `records` tells what was spooled."""

    def __init__(self, folder: Path, *, redis_url: str = "", server: ServerLimits | None = None) -> None:
        self.keyring = Keyring.fresh()
        crypto.install(self.keyring)
        self.spool_dir = folder / "spool"
        self.watcher = ToldWatcher()
        self.registry = Registry()
        self.gateway = Gateway(
            watcher=self.watcher, spool_dir=self.spool_dir, registry=self.registry, redis_url=redis_url
        )
        self._snapshot = Snapshot(version=1)
        self._thread = LoopThread("house")
        self._socket = socket.socket()
        self._socket.bind((LOOPBACK, 0))
        self.port = self._socket.getsockname()[1]
        config = Config(
            self._application(), limits=server or ServerLimits(grace_seconds=0, drain_seconds=0.2)
        )
        config.lifespan = "off"
        self._server = Server(config, drain=self.registry)
        self.key = self.issue("first")
        self._run = asyncio.run_coroutine_threadsafe(self._serve(), self._thread.loop)
        self._wait_until_up()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    def stop(self) -> None:
        if not self._run.done():
            self._server.should_exit = True
            self._run.result(10)
            self._thread.stop()

    # -- configuration -----------------------------------------------------------------------------------------------

    def issue(self, name: str, **limits: Any) -> str:
        """A gateway key with these limits (fields of Caller); the whole key."""
        key_id, secret = keys.random_text(10), keys.random_text(32)
        number = len(self._snapshot.callers) + 1
        self.admit(Caller(number, key_id, name, "", keys.digest(secret, PEPPERS[1]), 1, **limits))
        return keys.compose(key_id, secret)

    def admit(self, caller: Caller) -> None:
        self._change(callers={**self._snapshot.callers, caller.key_id: caller})

    def revoke(self, key: str) -> None:
        parts = keys.parse(key)
        assert parts is not None
        self._change(callers={each: c for each, c in self._snapshot.callers.items() if each != parts.key_id})

    def provide(
        self,
        slug: str,
        url: str,
        *,
        kind: str = "openai-compatible",
        models: tuple[str, ...] = ("tiny",),
        key: str = "sk-upstream-0123456789",
        timeouts: Timeouts = QUICK,
        **fields: Any,
    ) -> int:
        """An enabled provider at `url` with one sealed key; its id."""
        number = len(self._snapshot.upstreams) + 1
        uid = str(uuid.uuid4())
        credentials: tuple[Credential, ...] = ()
        if key:
            sealed = self.keyring.seal(key, aad=aad_for("providers.apikey", "secret", uid, origin_of(url)))
            credentials = (Credential(number, uid, "default", sealed),)
        endpoint = Endpoint(
            number, str(uuid.uuid4()), slug, slug, kind, url, allow_private=True, timeouts=timeouts,
            headers=fields.pop("headers", ()),
        )  # fmt: skip
        upstream = Upstream(
            endpoint,
            adapters.kind(kind),
            fields.pop("priority", number),
            frozenset({"chat"}),
            credentials,
            models,
        )
        upstreams = {**self._snapshot.upstreams, number: replace(upstream, **fields)}
        catalogue: dict[str, tuple[int, ...]] = {}
        for each in sorted(upstreams.values(), key=lambda u: (u.priority, u.id)):
            for name in each.models:
                catalogue[name] = (*catalogue.get(name, ()), each.id)
        self._change(
            upstreams=upstreams, by_slug={u.slug: u.id for u in upstreams.values()}, catalogue=catalogue
        )
        return number

    def add_key(self, provider_id: int, key: str, *, quota: Quota | None = None, weight: int = 1) -> int:
        """One more sealed key of a provider; its id."""
        upstream = self._snapshot.upstreams[provider_id]
        number, uid = 100 * provider_id + len(upstream.credentials), str(uuid.uuid4())
        aad = aad_for("providers.apikey", "secret", uid, upstream.endpoint.origin)
        credential = Credential(number, uid, f"key-{number}", self.keyring.seal(key, aad=aad), weight, quota)
        upstream = replace(upstream, credentials=(*upstream.credentials, credential))
        self._change(upstreams={**self._snapshot.upstreams, provider_id: upstream})
        return number

    def activate(self, *targets: tuple[int, str]) -> None:
        """Make these (provider id, model) the active provider of chat and its fallbacks."""
        self._change(active={"chat": tuple(Choice(number, model) for number, model in targets)})

    def route(
        self, name: str, *nodes: int | Node, mode: str = "auto", strategy: str = "round-robin", **fields: Any
    ) -> Route:
        """A model route to these nodes; a provider's id alone is a node with nothing special."""
        number = len(self._snapshot.routes) + 1
        made = tuple(
            Node(100 * number + place, node) if isinstance(node, int) else node
            for place, node in enumerate(nodes)
        )
        route = Route(number, name, mode, strategy, made, **fields)
        self._change(routes={**self._snapshot.routes, name: route})
        return route

    def charge(self, *prices: tuple[int, str, Price]) -> None:
        """Let models of providers cost something, as overrides do; the names may hold `*`."""
        said: dict[int, list[Override]] = {}
        for number, model, price in prices:
            said.setdefault(number, []).append(Override(model, Dated(0.0, FOREVER, price)))
        self.price_by(PriceBook(overrides=said))

    def price_by(self, book: PriceBook) -> None:
        self._change(prices=book)

    def know(self, provider_id: int, model: str, **facts: Any) -> None:
        """What is known of a model (fields of ModelFacts)."""
        self._change(facts={**self._snapshot.facts, (provider_id, model): ModelFacts(**facts)})

    def shorten(self, **seconds: float) -> None:
        """Change the timeouts of every provider."""
        self._change(
            upstreams={
                number: replace(
                    each, endpoint=replace(each.endpoint, timeouts=replace(each.endpoint.timeouts, **seconds))
                )
                for number, each in self._snapshot.upstreams.items()
            }
        )

    def weather(self, **fields: Any) -> None:
        self.watcher.weather = Weather(**fields)

    def _change(self, **fields: Any) -> None:
        self._snapshot = replace(self._snapshot, version=self._snapshot.version + 1, **fields)
        self.watcher.snapshot = self._snapshot

    # -- what tests ask ----------------------------------------------------------------------------------------------

    def ask(self, model: str | None = "tiny", *, key: str | None = None, **body: Any) -> httpx.Response:
        """POST a chat completion and read the whole answer."""
        sent: dict[str, Any] = {"messages": [{"role": "user", "content": "hello there"}], **body}
        if model is not None:
            sent["model"] = model
        return httpx.post(
            f"{self.url}/v1/chat/completions",
            json=sent,
            headers={"Authorization": f"Bearer {key or self.key}"},
            timeout=30,
        )

    def records(self, count: int = 1, seconds: float = 5.0) -> list[dict[str, Any]]:
        """The final records in the spool, in order, once there are at least `count` and none is open."""
        deadline = time.monotonic() + seconds
        while True:
            finals, open_starts = self._read_spool()
            if len(finals) >= count and not open_starts:
                return sorted(finals, key=lambda record: str(record["id"]))
            assert time.monotonic() < deadline, f"{len(finals)} finals, {open_starts} starts still open"
            time.sleep(0.01)

    def _read_spool(self) -> tuple[list[dict[str, Any]], int]:
        finals: dict[str, dict[str, Any]] = {}
        starts: set[str] = set()
        for path in sorted(self.spool_dir.iterdir()) if self.spool_dir.exists() else []:
            with path.open("rb") as lines:
                contents = read(lines)
            finals.update(contents.finals)
            starts.update(contents.open_starts)
        return list(finals.values()), len(starts - finals.keys())

    # -- running -----------------------------------------------------------------------------------------------------

    def _application(self) -> Any:
        return ProtocolTypeRouter(
            {
                "http": URLRouter(http_routes(self.gateway, Control())),
                "websocket": URLRouter(websocket_routes(self.gateway)),
            }
        )

    async def _serve(self) -> None:
        await self.gateway.start()
        try:
            await self._server.serve(sockets=[self._socket])
        finally:
            await self.gateway.stop()

    def _wait_until_up(self) -> None:
        deadline = time.monotonic() + 10
        while not self._server.started:
            assert not self._run.done(), self._run.exception()
            assert time.monotonic() < deadline
            time.sleep(0.005)
