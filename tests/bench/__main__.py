"""`make bench`: what Penstock costs beside a bare pass-through, in one run on one machine.

A fast upstream (`upstream`), the bare pass-through (`bare`: an ASGI function and aiohttp on uvicorn) and Penstock as people run it
(`manage.py serve` on SQLite with a Valkey), once with one worker and once with two, with a key that has request, token and
concurrency limits, so that key check, limits, routing, usage record and metrics all take part. The load generator (`load`) is a
process of its own. docs/benchmarks.md says what each line means and has the figures we got.

Parts: `plain`, one JSON answer; `stream`, 100 chunks without a pause; `paced`, 200 callers at once that each get a chunk every
20 ms; each with a prompt of 1 KB and of 100 KB (`rounds`). `first`, the time to the first token (`first_token`). `memory`, of an
open stream, and with --long after 100,000 requests.

Trust the CPU time per request (for paced: per chunk), which is what the operating system booked for the server's processes,
and above all its ratio in the same run. Requests per second say little when caller, gateway and upstream share a few cores. What
we want stands beside each figure; a missed one is marked, and is no failure of the run. A failed request is one.

    python -m tests.bench [--quick] [--only plain,first] [--no-limits] [--long] [--peers] [--profile]
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from statistics import median

from tests.bench import first_token, memory, peers, profiling, servers
from tests.bench.rounds import (
    HEADER,
    Measured,
    Mode,
    NothingAnswered,
    compare,
    failures,
    modes,
    print_lines,
)
from tests.bench.servers import BARE, OURS, OURS_TWICE, Server

PARTS = ("plain", "stream", "paced", "first", "memory")
# The most used gateway in Python is to need this many times our CPU time.
PYTHON_PEER, PYTHON_TARGETS = "litellm", {"plain 1 KB": 20, "stream 1 KB": 40}


def main() -> int:
    options = _options()
    if options.profile:
        profiling.main(limits=options.limits)
        return 0
    with contextlib.ExitStack() as stack:
        failed = _beside_peers(stack, options) if options.peers else _beside_bare(stack, options)
    return 1 if failed else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument(
        "--quick", action="store_true", help="fewer and shorter rounds: enough to see a large change"
    )
    parser.add_argument(
        "--only", default=",".join(PARTS), metavar="PARTS", help=f"of {', '.join(PARTS)}; with commas"
    )
    parser.add_argument("--no-limits", dest="limits", action="store_false", help="a key without any limit")
    parser.add_argument("--long", action="store_true", help="memory after 100,000 requests too")
    parser.add_argument("--peers", action="store_true", help="beside the other gateways that are installed")
    parser.add_argument(
        "--profile", action="store_true", help="print where the web process spends its time instead"
    )
    options = parser.parse_args()
    options.only = set(options.only.split(","))
    if options.only - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}")
    return options


def _beside_bare(stack: contextlib.ExitStack, options: argparse.Namespace) -> int:
    """Every part; how many requests failed."""
    upstream = servers.upstream(stack)
    failed = 0
    if options.only - {"memory"}:
        bare = servers.bare(stack, upstream)
        one = servers.ours(stack, upstream, limits=options.limits)
        two = servers.ours(stack, upstream, limits=options.limits, workers=2)
        failed += _table([bare, one, two], options)
        if "first" in options.only:
            failed += first_token.measure(bare, one, quick=options.quick)
    if "memory" in options.only:
        memory.open_streams(
            [servers.bare(stack, upstream), servers.ours(stack, upstream, limits=options.limits)]
        )
    if options.long:
        failed += memory.after_requests(servers.ours(stack, upstream, limits=options.limits))
    return failed


def _beside_peers(stack: contextlib.ExitStack, options: argparse.Namespace) -> int:
    upstream = servers.upstream(stack)
    found = [
        servers.bare(stack, upstream),
        servers.ours(stack, upstream, limits=options.limits),
        *peers.installed(stack, upstream),
    ]
    return _table(found, options)


def _table(found: list[Server], options: argparse.Namespace) -> int:
    chosen = [mode.quick() if options.quick else mode for mode in modes() if mode.kind in options.only]
    if chosen:
        print(HEADER, flush=True)
    failed = 0
    for mode in chosen:
        rounds = _rounds(mode, found)
        failed += failures(rounds, (BARE, OURS, OURS_TWICE))
        print_lines(mode, [server for server in found if server.name in rounds], rounds)
        _print_advantage(mode, rounds)
    return failed


def _rounds(mode: Mode, found: list[Server]) -> dict[str, list[Measured]]:
    """The rounds of this mode. A peer that answers nothing is said and left out; ours and the bare one have to."""
    while True:
        try:
            return compare(mode, found)
        except NothingAnswered as error:
            if error.server.name in (BARE, OURS, OURS_TWICE):
                raise SystemExit(str(error)) from None
            print(error)
            found = [server for server in found if server is not error.server]


def _print_advantage(mode: Mode, rounds: dict[str, list[Measured]]) -> None:
    if PYTHON_PEER not in rounds or mode.name not in PYTHON_TARGETS:
        return
    pairs = zip(rounds[PYTHON_PEER], rounds[OURS], strict=True)
    times = median(theirs.cpu_us / own.cpu_us for theirs, own in pairs)
    target = PYTHON_TARGETS[mode.name]
    missed = "  missed" if times < target else ""
    print(f"  {PYTHON_PEER} needs {times:.1f} times the CPU time of penstock, target {target}{missed}")


if __name__ == "__main__":
    sys.exit(main())
