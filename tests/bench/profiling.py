"""`python -m tests.bench --profile`: which functions of the web process take the time, for plain answers and for streams.

The web process runs under cProfile from the first request to the last; what it does to start is left out.
"""

from __future__ import annotations

import contextlib
import cProfile
import os
import pstats
import signal
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.bench import rounds, servers
from tests.bench.load import Load
from tests.bench.servers import Server
from tests.support.processes import REPOSITORY, Process

FUNCTIONS = 25
TIMEOUT = 60.0
BEGIN, END = signal.SIGUSR1, signal.SIGUSR2
LOADS = {
    "plain": Load(port=0, model="plain", count=4000, seconds=TIMEOUT),
    "stream": Load(port=0, model="stream", count=1000, seconds=TIMEOUT),
}


def main(*, limits: bool) -> None:
    """Print the functions with the most time of their own. cProfile makes small functions look dearer than they are."""
    with contextlib.ExitStack() as stack:
        upstream = servers.upstream(stack)
        gateway, key = servers.prepared(stack, upstream, limits=limits, workers=1)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-profile-")))
        command = [sys.executable, "-m", "tests.bench.profiling", folder / "profile"]
        process = stack.enter_context(Process(command, name="web", env=gateway.env, cwd=REPOSITORY))
        process.wait_until(gateway.ready, timeout=TIMEOUT, every=0.05)
        for name, load in LOADS.items():
            _profile(name, load, Server(servers.OURS, gateway.port, key, process), folder / "profile")


def _profile(name: str, load: Load, server: Server, file: Path) -> None:
    rounds.apply(replace(load, count=load.connections), server)
    server.process.send_signal(BEGIN)
    rounds.apply(load, server)
    server.process.send_signal(END)
    server.process.wait_until(file.exists, timeout=TIMEOUT)
    print(f"\n{name}, {load.count} requests\n")
    pstats.Stats(str(file)).strip_dirs().sort_stats("tottime").print_stats(FUNCTIONS)
    file.unlink()


def serve(file: str) -> None:
    """Be `manage.py serve`, and between the two signals under cProfile."""
    from django.core.management import execute_from_command_line

    profile = cProfile.Profile()

    def end(*_: object) -> None:
        profile.disable()
        profile.dump_stats(f"{file}.part")
        os.rename(f"{file}.part", file)
        profile.clear()

    signal.signal(BEGIN, lambda *_: profile.enable())
    signal.signal(END, end)
    os.environ["DJANGO_SETTINGS_MODULE"] = "config.settings"
    execute_from_command_line(["manage.py", "serve", "--grace", "0"])


if __name__ == "__main__":
    serve(sys.argv[1])
