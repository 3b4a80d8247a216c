"""Resident memory: for each open stream, and after many requests.

Measured on servers that have done nothing else: what an earlier load freed is used again, and would hide what a stream takes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict

from tests.bench import cpu
from tests.bench.load import Load
from tests.bench.rounds import apply, verdict
from tests.bench.servers import Server
from tests.support.processes import REPOSITORY

STREAMS = 1000
OPEN_TIMEOUT = 30.0
SETTLE_SECONDS = 2.0
STREAM_TARGET_KIB = 64
LONG_REQUESTS = 100_000
LONG_TIMEOUT = 900.0
WORKER_TARGET_MIB = 160
FLAT_MIB = 4  # What the second half of the requests may add: noise of the allocator, not a leak.


def open_streams(servers: list[Server]) -> None:
    """Print what each of 1,000 streams holds while it is open and gets a chunk every second."""
    print(f"\nmemory per open stream, {STREAMS:,} at once, target {STREAM_TARGET_KIB} KiB")
    for server in servers:
        apply(
            Load(port=0, model="stream", count=32, seconds=20), server
        )  # What the first stream loads is not a stream's.
        before = _total(server)
        held = _held(server) - before
        each = held / STREAMS / 1024
        target = STREAM_TARGET_KIB if server.name != "bare" else 0
        print(f"  {server.name}: {each:.1f} KiB{verdict(each, target)}", flush=True)


def after_requests(server: Server) -> int:
    """Print the memory of a worker after half and after all of 100,000 requests; how many failed."""
    load = Load(port=0, model="plain", count=LONG_REQUESTS // 2, seconds=LONG_TIMEOUT)
    failed, sizes = 0, []
    for _ in range(2):
        result = apply(load, server)
        failed += result.failed + load.count - result.done - result.failed
        sizes.append(_largest_mib(server))
    growth = sizes[1] - sizes[0]
    print(
        f"\nmemory of a worker: {sizes[0]:.0f} MiB after {load.count:,} requests, {sizes[1]:.0f} MiB after {LONG_REQUESTS:,}, "
        f"target {WORKER_TARGET_MIB}{verdict(sizes[1], WORKER_TARGET_MIB)}; "
        f"growth in between {growth:.1f} MiB, flat is at most {FLAT_MIB}{verdict(growth, FLAT_MIB)}",
        flush=True,
    )
    return failed


def _largest_mib(server: Server) -> float:
    """Of the server's processes the one with the most resident memory."""
    return max(map(cpu.resident_bytes, server.process.family())) / 2**20


def _total(server: Server) -> int:
    return sum(map(cpu.resident_bytes, server.process.family()))


def _held(server: Server) -> int:
    """Resident bytes of the server while it holds the streams open."""
    load = Load(
        server.port,
        "held",
        count=STREAMS,
        seconds=OPEN_TIMEOUT,
        key=server.key,
        headers=dict(server.headers),
        hold=True,
    )
    command = [sys.executable, "-m", "tests.bench.load", json.dumps(asdict(load))]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        if holder.stdout.readline() != "open\n":
            raise SystemExit(f"{server.name}: {STREAMS} streams did not begin within {OPEN_TIMEOUT} s")
        time.sleep(SETTLE_SECONDS)  # Each stream has had a chunk or two.
        held = _total(server)
        holder.stdin.close()
    return held
