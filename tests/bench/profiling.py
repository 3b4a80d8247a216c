"""`python -m tests.bench --profile`: which functions of the web process take the time, for plain answers and for streams."""

from __future__ import annotations

import contextlib
import pstats
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.bench import rounds, servers
from tests.bench.load import Load
from tests.bench.servers import Server
from tests.support.processes import REPOSITORY, Process

FUNCTIONS = 25
START_TIMEOUT = 40.0
STOP_TIMEOUT = 30.0
LOADS = {
    "plain": Load(port=0, model="plain", count=4000, seconds=60),
    "stream": Load(port=0, model="stream", count=1000, seconds=60),
}


def main(*, limits: bool) -> None:
    """Print the functions with the most time of their own. cProfile makes small functions look dearer than they are."""
    with contextlib.ExitStack() as stack:
        upstream = servers.upstream(stack)
        gateway, key = servers.prepared(stack, upstream, limits=limits, workers=1)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-profile-")))
        for name, load in LOADS.items():
            file = folder / name
            serve = ["manage.py", "serve", "--grace", "0"]
            command = [sys.executable, "-m", "cProfile", "-o", file, *serve]
            with Process(command, name="web", env=gateway.env, cwd=REPOSITORY) as process:
                process.wait_until(gateway.ready, timeout=START_TIMEOUT, every=0.05)
                server = Server(servers.OURS, gateway.port, key, process)
                rounds.apply(replace(load, count=load.connections), server)
                rounds.apply(load, server)
                process.stop(timeout=STOP_TIMEOUT)  # It writes the profile at its end.
            print(f"\n{name}, {load.count} requests\n")
            pstats.Stats(str(file)).strip_dirs().sort_stats("tottime").print_stats(FUNCTIONS)
