"""The time that the gateway adds to a stream's first token while it is half busy.

First a closed loop finds how many streams a second the gateway can do here. Then streams begin at even intervals, half as many
a second, whether or not those before have ended (an open loop: a slow answer delays no other request), on the bare
pass-through and on the gateway in turns. What is added is the difference of the two in one round.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median

from tests.bench.load import Load, Result
from tests.bench.rounds import QUICK, apply, verdict
from tests.bench.servers import Server

BUSIEST = Load(port=0, model="stream", count=1200, seconds=10)
SECONDS = 2.5
ROUNDS = 9
P50_TARGET_MS = 1.0
P99_TARGET_MS = 5.0


def measure(bare: Server, gateway: Server, *, quick: bool) -> int:
    """Print the two lines; how many requests to the gateway failed."""
    busiest = apply(BUSIEST, gateway)
    rate = busiest.done / busiest.seconds / 2
    load = replace(BUSIEST, rate=rate, count=max(1, int(rate * SECONDS)))
    rounds = [(apply(load, bare), apply(load, gateway)) for _ in range(ROUNDS // QUICK if quick else ROUNDS)]
    print(f"\nfirst token at half load, {rate:.0f} streams/s at even intervals (open loop)")
    _print_line("p50", [(one.first_p50_ms, two.first_p50_ms) for one, two in rounds], P50_TARGET_MS)
    _print_line("p99", [(one.first_p99_ms, two.first_p99_ms) for one, two in rounds], P99_TARGET_MS)
    return _failed(busiest, *(two for _, two in rounds))


def _print_line(name: str, pairs: list[tuple[float, float]], target: float) -> None:
    added = sorted(two - one for one, two in pairs)
    print(
        f"  {name}: bare {median(one for one, _ in pairs):.2f} ms, penstock {median(two for _, two in pairs):.2f} ms, "
        f"added {median(added):.2f} ms ({added[0]:.2f} to {added[-1]:.2f}), target {target:.0f}"
        f"{verdict(median(added), target)}",
        flush=True,
    )


def _failed(*results: Result) -> int:
    return sum(result.failed for result in results)
