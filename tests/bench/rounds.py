"""The same load on several servers, in short rounds that alternate between them, and the table that comes of it.

A machine is not equally fast all the time. So each round asks every server in turn, its ratio is that of one round, and the table
shows the median of the rounds with the smallest and the largest beside it. Many short rounds say more than a few long ones: what disturbs
the machine for a second then spoils one ratio of fifteen.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median

from tests.bench import cpu
from tests.bench.load import Load, Result
from tests.bench.servers import BARE, OURS, OURS_TWICE, Server
from tests.bench.upstream import CHUNKS
from tests.support.processes import REPOSITORY

ROUNDS = 15
PACED_ROUNDS = 5
QUICK, FEWEST = 3, 3
"""By how many `--quick` divides the rounds, and how many there always are."""
WORKERS_TARGET = 1.1
HEADER = (
    f"{'mode':<14}{'server':<12}{'req/s':>7}{'CPU us':>9}{'ratio':>8}{'rounds':>14}  {'of':<9}"
    f"{'target':>6}{'first token p50/p99 ms':>24}{'failed':>8}"
)


@dataclass(frozen=True, slots=True)
class Mode:
    """What is sent in one round. target: the highest ratio to the bare pass-through that we want."""

    name: str
    load: Load
    target: float
    unit: int = 1  # the CPU time of a request is divided by this: chunks of a paced stream
    rounds: int = ROUNDS

    @property
    def kind(self) -> str:
        return self.name.split()[0]

    def quick(self) -> Mode:
        return replace(self, rounds=max(self.rounds // QUICK, FEWEST))


@dataclass(frozen=True, slots=True)
class Measured:
    """One round of one server. cpu_us: of its processes, per request or chunk."""

    result: Result
    cpu_us: float


class NothingAnswered(Exception):
    """A server answered no request of a round; the message says how it refused."""

    def __init__(self, server: Server, mode: Mode, failure: str) -> None:
        super().__init__(f"{server.name}, {mode.name}: nothing was answered; {failure}")
        self.server = server


def modes() -> list[Mode]:
    plain = Load(port=0, model="plain", count=600, seconds=20)
    stream = Load(port=0, model="stream", count=160, seconds=20)
    paced = Load(port=0, model="paced", count=200, seconds=20, connections=200)
    large = 100 * 1024
    return [
        Mode("plain 1 KB", plain, 2.0),
        Mode("plain 100 KB", replace(plain, count=300, prompt=large), 2.0),
        Mode("stream 1 KB", stream, 1.3),
        Mode("stream 100 KB", replace(stream, prompt=large), 1.3),
        Mode("paced 1 KB", paced, 1.5, CHUNKS, PACED_ROUNDS),
        Mode("paced 100 KB", replace(paced, prompt=large), 1.5, CHUNKS, PACED_ROUNDS),
    ]


def apply(load: Load, server: Server) -> Result:
    """Load a server from a process of its own."""
    load = replace(load, port=server.port, key=server.key, headers=dict(server.headers))
    command = [sys.executable, "-m", "tests.bench.load", json.dumps(asdict(load))]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, check=True)
    return Result(**json.loads(done.stdout))


def compare(mode: Mode, servers: Sequence[Server]) -> dict[str, list[Measured]]:
    """Measure the servers in rounds, one after another in each; the rounds of each. Raises NothingAnswered."""
    rounds: dict[str, list[Measured]] = {server.name: [] for server in servers}
    for server in servers:  # Warm: code is loaded, and connections to the upstream are open.
        apply(replace(_share(mode.load, server), count=mode.load.connections), server)
    for _ in range(mode.rounds):
        for server in servers:
            rounds[server.name].append(_measure(mode, server))
    return rounds


def print_lines(mode: Mode, servers: Sequence[Server], rounds: dict[str, list[Measured]]) -> None:
    for server in servers:
        print(_line(mode, server, rounds), flush=True)


def ratios(server: Server, rounds: dict[str, list[Measured]]) -> list[float]:
    """CPU time of a server to that of the one it is compared with, round by round."""
    pairs = zip(rounds[server.name], rounds[server.against], strict=True)
    return [own.cpu_us / other.cpu_us for own, other in pairs]


def failures(rounds: dict[str, list[Measured]], names: Sequence[str]) -> int:
    """How many requests to these servers failed."""
    return sum(each.result.failed for name in names for each in rounds.get(name, ()))


def verdict(value: float, target: float) -> str:
    """What stands behind a figure."""
    return "  missed" if target and value > target else ""


def _share(load: Load, server: Server) -> Load:
    count = max(1, load.count // server.share)
    return replace(load, count=count, connections=min(load.connections, count))


def _measure(mode: Mode, server: Server) -> Measured:
    family = server.process.family()
    before = cpu.seconds(family)
    result = apply(_share(mode.load, server), server)
    used = cpu.seconds(family) - before
    if not result.done:
        raise NothingAnswered(server, mode, result.failure)
    return Measured(result, used * 1e6 / result.done / mode.unit)


def _line(mode: Mode, server: Server, rounds: dict[str, list[Measured]]) -> str:
    own = rounds[server.name]
    results = [each.result for each in own]
    speed = median(result.done / result.seconds for result in results)
    first = f"{median(r.first_p50_ms for r in results):.1f} / {median(r.first_p99_ms for r in results):.1f}"
    found = ratios(server, rounds)
    ratio, spread = median(found), f"{min(found):.2f}-{max(found):.2f}"
    target = {OURS: mode.target, OURS_TWICE: WORKERS_TARGET}.get(server.name, 0.0)
    compared = f"{ratio:>8.2f}{spread:>14}  {server.against:<9}{target or '':>6}"
    return (
        f"{mode.name:<14}{server.name:<12}{speed:>7.0f}{median(each.cpu_us for each in own):>9.1f}"
        f"{'' if server.name == BARE else compared:<39}{first:>24}{sum(r.failed for r in results):>8}{verdict(ratio, target)}"
    )
