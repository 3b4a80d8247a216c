"""What a worker's data plane consists of; made once, handed to the consumers, started and stopped with the server."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from pathlib import Path

from django.conf import settings

from providers.client import tls_context
from providers.connections import Pools
from proxy import metrics
from proxy.auth import Caller
from proxy.breaker import Breakers
from proxy.cache import Cache
from proxy.candidates import Conditions
from proxy.cooldown import Cooldowns
from proxy.grants import Grants
from proxy.grapevine import Grapevine, Hearsay
from proxy.inflight import REGISTRY, Registry
from proxy.journey import RetryBudget
from proxy.limits import Limits
from proxy.overload import Overload
from proxy.spool import Spool
from proxy.strategies import ROUTES
from proxy.traffic import Traffic
from proxy.watcher import WATCHER, Watcher

logger = logging.getLogger(__name__)


class Gateway:
    """watcher: configuration and weather. pools: connections to providers. spool: the usage log on disk.

    breakers, cache, cooldowns, retries, routes, limits, grants, registry, traffic: as their modules say.
    """

    def __init__(
        self, *, watcher: Watcher, registry: Registry, spool_dir: Path, redis_url: str = "", workers: int = 1
    ) -> None:
        self.watcher = watcher
        self.registry = registry
        self._spool_dir, self._redis_url, self._workers = spool_dir, redis_url, workers
        self._chores: list[asyncio.Task[None]] = []
        self._make()

    def _make(self) -> None:
        """What belongs to one process: a worker is forked after this module was imported, and makes its own."""
        self.spool = Spool(self._spool_dir)
        self.grants = Grants(self.spool.worker)
        self.limits = Limits(self._redis_url, workers=self._workers)
        self.cache = Cache(self.limits.link, workers=self._workers)
        self.breakers = Breakers()
        self.cooldowns = Cooldowns()
        self.grapevine = Grapevine(self._redis_url)
        self.heard = Hearsay()
        self.traffic = Traffic(self._redis_url)
        self.overload = Overload(
            most_running=settings.MAX_RUNNING_REQUESTS, memory_limit=settings.MEMORY_LIMIT_BYTES
        )
        self.retries = RetryBudget(lambda: self.registry.running)
        self.routes = ROUTES
        self.pools = Pools()

    def conditions(self) -> Conditions:
        """What may not be dialled at this moment."""
        circuits, resting = self.breakers.open(), self.cooldowns.resting()
        if self.heard:
            elsewhere, tired = self.heard.left(time.monotonic())
            circuits, resting = {**elsewhere, **circuits}, {**tired, **resting}
        return Conditions(self.watcher.weather, circuits, resting, self.breakers.may_force)

    def swap(self) -> None:
        """Exchange with other workers what was seen; in the watcher's thread."""
        self.heard = self.grapevine.swap(Hearsay(self.breakers.open(), self.cooldowns.resting()))

    async def start(self) -> None:
        """Read the configuration, open the spool, begin to sweep. Raises when the database cannot be read."""
        self._make()
        loop = asyncio.get_running_loop()
        self.watcher.swap, self.watcher.opened = self.swap, self.breakers.opened
        recovered = self.breakers.recovered
        self.watcher.recovered = lambda provider_id: loop.call_soon_threadsafe(recovered, provider_id)
        # Reading the certificates takes a third of a second, which would be the first request's.
        await asyncio.gather(asyncio.to_thread(self.watcher.start), asyncio.to_thread(tls_context))
        self.spool.run()
        # A revoked key ends its streams when the snapshot says so, not at the next sweep.
        self.watcher.on_change = functools.partial(
            loop.call_soon_threadsafe, self.registry.sweep, self._is_good
        )
        self._chores = [asyncio.create_task(self._sweep()), asyncio.create_task(self._publish())]

    async def stop(self) -> None:
        for chore in self._chores:
            chore.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await chore
        self.watcher.on_change = lambda: None
        await self.pools.close()
        await self.limits.close()
        await asyncio.to_thread(self.watcher.stop)
        self.watcher.swap, self.watcher.opened = lambda: None, dict
        self.grapevine.close()
        await asyncio.to_thread(metrics.count)
        await asyncio.to_thread(self.traffic.close)
        await self.grants.close()
        await asyncio.to_thread(self.spool.close)

    async def _sweep(self) -> None:
        """Once a second: end what may not go on, keep the leases of what does."""
        while True:
            await asyncio.sleep(1)
            try:
                self.registry.sweep(self._is_good)
                self.overload.measure()
                self.grants.sweep()
                await self.limits.sweep()
                metrics.weather(self)
            except Exception:
                logger.exception("the sweep failed")

    async def _publish(self) -> None:
        """Once a second, in a thread that nobody waits for: count what was answered."""
        while True:
            await asyncio.sleep(1)
            try:
                await asyncio.to_thread(metrics.count)
                await asyncio.to_thread(self.traffic.publish)
            except Exception:
                logger.exception("requests were not counted")

    def _is_good(self, caller: Caller) -> bool:
        return self.watcher.snapshot.caller_is_good(caller, time.time())


GATEWAY = Gateway(
    watcher=WATCHER,
    registry=REGISTRY,
    spool_dir=settings.SPOOL_DIR,
    redis_url=settings.REDIS_URL,
    workers=settings.WEB_CONCURRENCY,
)
"""This process's."""
