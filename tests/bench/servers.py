"""What is measured, and the upstream behind it: started on loopback, ended at the end of a stack."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from tests.support.gateway import Gateway
from tests.support.ports import accepts, free_port
from tests.support.processes import REPOSITORY, Process
from tests.support.valkey import Valkey

START_TIMEOUT = 15.0
BARE, OURS, OURS_TWICE = "bare", "penstock", "penstock x2"
MODELS = ("plain", "stream", "paced", "held")
UPSTREAM_KEY = "sk-upstream-0123456789"
LIMITS = {"requests_per_minute": 100_000_000, "tokens_per_minute": 2_000_000_000, "max_concurrency": 100_000}


@dataclass(frozen=True, slots=True)
class Server:
    """Where it listens, the key and headers it wants, and its processes.

    against: the server whose CPU time is 1 in its ratio. share: it gets one request where the others get this many, so that a
    slow one takes no longer.
    """

    name: str
    port: int
    key: str
    process: Process
    headers: Mapping[str, str] = field(default_factory=dict)
    against: str = BARE
    share: int = 1


def start(
    stack: contextlib.ExitStack,
    command: list[str],
    name: str,
    port: int,
    env: Mapping[str, str],
    timeout: float = START_TIMEOUT,
) -> Process:
    """Start a server and wait until it accepts. StartFailed, with its log, when it does not in time."""
    process = Process(command, name=name, env=env, cwd=REPOSITORY)
    stack.callback(process.stop, timeout=3)
    process.wait_until(lambda: accepts(port), timeout=timeout)
    return process


def upstream(stack: contextlib.ExitStack) -> str:
    """Start the upstream; its address."""
    port = free_port()
    start(stack, [sys.executable, "-m", "tests.bench.upstream", str(port)], "upstream", port, os.environ)
    return f"http://127.0.0.1:{port}"


def bare(stack: contextlib.ExitStack, address: str) -> Server:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "tests.bench.bare:app", "--port", str(port)]
    command += ["--loop", "uvloop", "--http", "httptools", "--no-access-log", "--log-level", "warning"]
    process = start(stack, command, BARE, port, {**os.environ, "UPSTREAM": address})
    return Server(BARE, port, "none", process)


def prepared(stack: contextlib.ExitStack, address: str, *, limits: bool, workers: int) -> tuple[Gateway, str]:
    """Penstock on SQLite with a Valkey of its own, not started yet; its gateway key. limits: whether the key has any."""
    valkey = stack.enter_context(Valkey())
    env = {"WEB_CONCURRENCY": str(workers)}
    gateway = stack.enter_context(Gateway(database="sqlite", redis=valkey, env=env, start=False))
    key = gateway.provide(
        f"{address}/v1", api_key=UPSTREAM_KEY, models=MODELS, limits=LIMITS if limits else None
    )
    return gateway, key


def ours(stack: contextlib.ExitStack, address: str, *, limits: bool = True, workers: int = 1) -> Server:
    """Penstock as people run it. With two workers its ratio is that to one worker."""
    gateway, key = prepared(stack, address, limits=limits, workers=workers)
    gateway.start()
    name, against = (OURS, BARE) if workers == 1 else (OURS_TWICE, OURS)
    return Server(name, gateway.port, key, gateway.process(), against=against)
