"""`make bench`: what Penstock costs beside a bare pass-through, in one run on one machine.

Three servers run: a fast upstream (`upstream`), the bare pass-through (`bare`: an ASGI function and aiohttp on uvicorn) and
Penstock as people run it (`manage.py serve` on SQLite with a Valkey), with a key that has request, token and concurrency
limits, so that key check, limits, routing, usage record and metrics all take part. For each mode the load generator (`load`, a
process of its own) calls the one and then the other.

Modes: `plain`, one JSON answer to a prompt of 1 KB and of 100 KB; `stream`, 100 chunks without a pause, for both prompts;
`paced`, 200 callers at once that each get a chunk every 20 ms.

Trust the CPU time per request (for paced: per chunk), which is what the operating system booked for the gateway's processes,
and above all its ratio to the bare pass-through of the same run. Requests per second say little when caller, gateway
and upstream share a few cores. `ratio` has the target beside it; a missed one is marked, and is no failure of the run.

    python -m tests.bench [--quick] [--only plain,stream]

--quick takes a quarter of the requests: enough to see a large change, not a small one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace

from tests.bench import cpu
from tests.bench.load import Load, Result
from tests.bench.upstream import CHUNKS
from tests.support.gateway import Gateway
from tests.support.ports import accepts, free_port
from tests.support.processes import REPOSITORY, Process
from tests.support.valkey import Valkey

START_TIMEOUT = 15.0
QUICK = 4
LIMITS = {"requests_per_minute": 100_000_000, "tokens_per_minute": 2_000_000_000, "max_concurrency": 100_000}
HEADER = f"{'mode':<14}{'server':<10}{'req/s':>8}{'CPU us':>9}{'ratio':>7}{'target':>8}{'first byte p50/p99 ms':>24}{'failed':>8}"


@dataclass(frozen=True, slots=True)
class Mode:
    """One line of the table. target: the highest ratio to the bare pass-through that we want."""

    name: str
    load: Load
    target: float
    unit: int = 1  # the CPU time of a request is divided by this: chunks of a paced stream


@dataclass(frozen=True, slots=True)
class Server:
    """What is measured: where it listens, the key it wants, and its processes."""

    name: str
    port: int
    key: str
    process: Process


@dataclass(frozen=True, slots=True)
class Measured:
    result: Result
    cpu_us: float


def modes() -> list[Mode]:
    plain = Load(port=0, model="plain", count=8000, seconds=30)
    stream = Load(port=0, model="stream", count=2000, seconds=30)
    paced = Load(port=0, model="paced", count=600, seconds=30, connections=200)
    return [
        Mode("plain 1 KB", plain, 2.0),
        Mode("plain 100 KB", replace(plain, count=3000, prompt=100 * 1024), 2.0),
        Mode("stream 1 KB", stream, 1.3),
        Mode("stream 100 KB", replace(stream, prompt=100 * 1024), 1.3),
        Mode("paced 1 KB", paced, 1.5, CHUNKS),
    ]


def main() -> int:
    options = _options()
    failed = 0
    with _servers() as servers:
        print(HEADER, flush=True)
        for mode in _chosen(options):
            failed += _compare(mode, servers)
        for server in servers:
            print(
                f"{server.name}: {cpu.resident_mebibytes(server.process.family()):.0f} MiB resident at the end"
            )
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument(
        "--only", default="", metavar="MODES", help="plain, stream or paced, separated by commas"
    )
    return parser.parse_args()


def _chosen(options: argparse.Namespace) -> list[Mode]:
    wanted = options.only.split(",") if options.only else [mode.name.split()[0] for mode in modes()]
    chosen = [mode for mode in modes() if mode.name.split()[0] in wanted]
    if options.quick:
        return [
            replace(mode, load=replace(mode.load, count=max(mode.load.count // QUICK, 200)))
            for mode in chosen
        ]
    return chosen


def _compare(mode: Mode, servers: list[Server]) -> int:
    """Measure the servers one after another and print their lines; how many requests failed."""
    base = 0.0
    failed = 0
    for server in servers:
        measured = _measure(mode, server)
        base = base or measured.cpu_us
        failed += measured.result.failed
        if not measured.result.done:
            raise SystemExit(f"{server.name}, {mode.name}: nothing was answered; {measured.result.failure}")
        print(_line(mode, server, measured, measured.cpu_us / base), flush=True)
    return failed


def _measure(mode: Mode, server: Server) -> Measured:
    load = replace(mode.load, port=server.port, key=server.key)
    _run(replace(load, count=load.connections * 2, seconds=5))  # warm: connections are open, code is loaded
    before = cpu.seconds(server.process.family())
    result = _run(load)
    used = cpu.seconds(server.process.family()) - before
    return Measured(result, used * 1e6 / max(1, result.done) / mode.unit)


def _run(load: Load) -> Result:
    command = [sys.executable, "-m", "tests.bench.load", json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return Result(**json.loads(done.stdout))


def _line(mode: Mode, server: Server, measured: Measured, ratio: float) -> str:
    result = measured.result
    bare = server.name == "bare"
    missed = "" if ratio <= mode.target else "  missed"
    return (
        f"{mode.name:<14}{server.name:<10}{result.done / result.seconds:>8.0f}{measured.cpu_us:>9.1f}"
        f"{'' if bare else f'{ratio:.2f}':>7}{'' if bare else f'{mode.target:.1f}':>8}"
        f"{f'{result.first_p50_ms:.1f} / {result.first_p99_ms:.1f}':>24}{result.failed:>8}{'' if bare else missed}"
    )


@contextlib.contextmanager
def _servers() -> Iterator[list[Server]]:
    """The upstream and what is measured, the bare pass-through first; ended at the end."""
    upstream, bare = free_port(), free_port()
    uvicorn = [
        sys.executable,
        "-m",
        "uvicorn",
        "tests.bench.bare:app",
        "--port",
        str(bare),
        "--loop",
        "uvloop",
    ]
    uvicorn += ["--http", "httptools", "--no-access-log", "--log-level", "warning"]
    address = f"http://127.0.0.1:{upstream}"
    with contextlib.ExitStack() as stack:
        _started(stack, [sys.executable, "-m", "tests.bench.upstream", str(upstream)], "upstream", upstream)
        bare_process = _started(stack, uvicorn, "bare", bare, UPSTREAM=address)
        valkey = stack.enter_context(Valkey())
        gateway = stack.enter_context(Gateway(database="sqlite", redis=valkey, start=False))
        names = ("plain", "stream", "paced")
        key = gateway.provide(f"{address}/v1", api_key="sk-upstream-0123456789", models=names, limits=LIMITS)
        gateway.start()
        yield [
            Server("bare", bare, "none", bare_process),
            Server("penstock", gateway.port, key, gateway.process()),
        ]


def _started(stack: contextlib.ExitStack, command: list[str], name: str, port: int, **env: str) -> Process:
    process = Process(command, name=name, env={**os.environ, **env}, cwd=REPOSITORY)
    stack.callback(process.stop, timeout=3)
    process.wait_until(lambda: accepts(port), timeout=START_TIMEOUT)
    return process


if __name__ == "__main__":
    sys.exit(main())
