"""`make run`: from a fresh clone to a running gateway, in the foreground; Ctrl-C drains and stops everything.

In this order: one launcher per data directory, secrets in `.env`, settings, Valkey, migrations, the first administrator and key,
then supervisord with all processes; when the gateway is ready, its addresses; then the logs, until a signal comes.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from config import envfile, processes
from config.claim import AlreadyRunning, Refused, make_data_dir, only_one, refuse_taken_port, write_address
from config.envfile import ROOT
from config.follow import LogFile
from config.greeting import Address, greeting

SHOWN_PROGRAMS = ("drainer", "worker", "beat", "web")
READY_SECONDS = 60.0
TICK_SECONDS = 0.1
SHORTEST_RUN_SECONDS = 10.0


@dataclass
class Stop:
    """Whether somebody asked us to stop; a second signal changes nothing."""

    asked: bool = False

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True


@dataclass
class Run:
    """What one run of the launcher knows."""

    address: Address
    environment: dict[str, str]
    run_dir: Path
    log_dir: Path
    stop: Stop
    logs: list[LogFile] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    os.chdir(ROOT)
    os.umask(0o077)  # All that we and our programs write is this user's alone.
    stop = Stop()
    stop.listen()
    try:
        launch(stop, dev="--dev" in arguments)
    except AlreadyRunning as running:
        say(f"already running at {running}")
    except (Refused, envfile.EnvFileError, processes.NoPrivateFolder) as error:
        say(str(error), file=sys.stderr)
        return 1
    return 0


def launch(stop: Stop, *, dev: bool) -> None:
    """Start, show and stop everything; returns when all processes are gone."""
    outside = dict(os.environ)
    env_path = Path(os.environ.get("ENV_FILE") or ROOT / ".env")
    data_dir = make_data_dir(envfile.data_dir(envfile.settings_in(env_path)))
    with only_one(data_dir) as lock:
        if envfile.write_missing_secrets(env_path):
            say(f"wrote fresh secrets to {env_path} (keep a copy of PENSTOCK_ENCRYPTION_KEY elsewhere)")
        run = prepare(outside, data_dir, stop, dev=dev)
        write_address(lock, run.address)
        wait_for_former_run(run)
        refuse_taken_port(run.address)
        manage(run, "migrate", "--no-input", "--verbosity", "0")
        keep_running(run, json.loads(manage(run, "first_run", "--json").strip().splitlines()[-1]))


def prepare(outside: Mapping[str, str], data_dir: Path, stop: Stop, *, dev: bool) -> Run:
    """Read the settings, and say to the programs what they cannot read in `.env`."""
    if dev:
        os.environ.setdefault("DEBUG", "true")
    from config import settings
    from config.env import refuse_wrong_settings

    refuse_wrong_settings(list(settings.SETTINGS_PROBLEMS))
    settings.LOG_DIR.mkdir(mode=0o700, parents=True, exist_ok=True)
    run_dir = processes.private_dir(data_dir)
    address = Address(settings.HOST, settings.PORT, settings.PUBLIC_URL)
    # What .env holds is left to the programs to read, so that Valkey's environment has no secret in it.
    environment = {
        **outside,
        "DATA_DIR": str(data_dir),
        "PYTHONUNBUFFERED": "1",
        # What packages have to say to their programmers is no line for the terminal: the tests fail on it.
        "PYTHONWARNINGS": outside.get("PYTHONWARNINGS") or "ignore",
        "LOG_FORMAT": "json" if settings.LOG_FORMAT == "auto" else settings.LOG_FORMAT,
        "PENSTOCK_RUN_ROOT": str(ROOT),
        "PENSTOCK_RUN_DIR": str(run_dir),
        "PENSTOCK_RUN_LOGS": str(settings.LOG_DIR),
        "PENSTOCK_RUN_PYTHON": sys.executable,
        "PENSTOCK_RUN_WEB": "serve",
        "PENSTOCK_RUN_WEB_AS_GROUP": "false",
        **embedded_valkey(settings.REDIS_URL, run_dir, data_dir),
    }
    if dev:
        host = f"[{address.host}]" if ":" in address.host else address.host
        # The autoreloader does not hand signals on to the server below it, so both are told.
        environment |= {
            "DEBUG": os.environ["DEBUG"],
            "PENSTOCK_RUN_WEB": f"runserver {host}:{address.port}",
            "PENSTOCK_RUN_WEB_AS_GROUP": "true",
        }
    return Run(address, environment, run_dir, settings.LOG_DIR, stop)


def embedded_valkey(redis_url: str, run_dir: Path, data_dir: Path) -> dict[str, str]:
    """What the programs are told about Redis: the one that is set, else ours, else none, which is said in one line."""
    if redis_url:
        return {"PENSTOCK_RUN_VALKEY": "none", "PENSTOCK_RUN_VALKEY_START": "false"}
    binary = processes.valkey_binary()
    if binary is None:
        (data_dir / "queue").mkdir(mode=0o700, exist_ok=True)
        say(
            "Valkey does not run on this machine: limits live in each process, and Celery queues in files below DATA_DIR"
        )
        return {"PENSTOCK_RUN_VALKEY": "none", "PENSTOCK_RUN_VALKEY_START": "false"}
    return {
        "REDIS_URL": f"unix://{run_dir / 'valkey.sock'}",
        "PENSTOCK_RUN_VALKEY": str(binary),
        "PENSTOCK_RUN_VALKEY_START": "true",
    }


def wait_for_former_run(run: Run) -> None:
    """A killed launcher's processes are still draining: wait for them, they use the same database and port."""
    former = processes.Supervisord(run.environment, run.run_dir)
    deadline = time.monotonic() + processes.STOP_SECONDS
    if former.stopping_elsewhere:
        say("waiting for the processes of an earlier run to end")
    while former.stopping_elsewhere:
        if run.stop.asked or time.monotonic() > deadline:
            raise Refused(f"not started: the supervisord behind {run.run_dir} has not ended yet")
        time.sleep(TICK_SECONDS)


def manage(run: Run, *arguments: str) -> str:
    """Run a management command to its end and return what it prints; it says itself why it failed."""
    if run.stop.asked:
        raise Refused("stopped before it was started")
    done = subprocess.run(
        [sys.executable, "manage.py", *arguments],
        env=run.environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        # Ctrl-C must not cut a migration in two.
        start_new_session=True,
    )
    if done.returncode:
        raise Refused(f"not started, because `manage.py {arguments[0]}` failed")
    return done.stdout


def keep_running(run: Run, first: Mapping[str, Any]) -> None:
    """Run supervisord until a signal comes; one that is killed is replaced, once its programs are gone."""
    run.logs = [LogFile(run.log_dir / f"{name}.log") for name in SHOWN_PROGRAMS]
    run.logs.append(LogFile(run.log_dir / "supervisord.log", wanted=(" WARN ", " ERRO ")))
    welcome: Mapping[str, Any] | None = first
    try:
        while not run.stop.asked:
            started = time.monotonic()
            server = processes.Supervisord(run.environment, run.run_dir)
            server.start()
            welcome = watch(run, server, welcome)
            if not run.stop.asked:
                say("supervisord died; ending its programs and starting again", file=sys.stderr)
                processes.end_orphans()
                if time.monotonic() - started < SHORTEST_RUN_SECONDS:
                    raise Refused(f"supervisord does not stay up; see {run.log_dir / 'supervisord.log'}")
    finally:
        if welcome is not None and (welcome.get("password") or welcome.get("gateway_key")):
            # They exist from now on and are told only once, so also when the gateway never became ready.
            print(greeting(run.address, welcome, ready=False), flush=True)
        for log in run.logs:
            log.close()
    with contextlib.suppress(OSError):
        run.run_dir.rmdir()  # Empty, unless something was killed and left its socket; then the next start cleans up.
    say("stopped")


def watch(
    run: Run, server: processes.Supervisord, welcome: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Show logs until supervisord ends, say when the gateway is ready, and pass on the wish to stop.

    welcome: what to tell when it is ready; None when that was told. Returns the same.
    """
    deadline = time.monotonic() + READY_SECONDS
    while server.running and not run.stop.asked:
        show(run)
        server.bury_adopted()
        if welcome is not None and is_ready(run.address):
            print(greeting(run.address, welcome, ready=True), flush=True)
            welcome = None
        if welcome is not None and time.monotonic() > deadline:
            say(
                f"not ready after {READY_SECONDS:g} seconds; the lines above say why. Still trying.",
                file=sys.stderr,
            )
            deadline = float("inf")
        time.sleep(TICK_SECONDS)
    if run.stop.asked:
        stop_all(run, server)
    return welcome


def stop_all(run: Run, server: processes.Supervisord) -> None:
    say("stopping; open streams have up to 30 seconds to end")
    server.ask_to_stop()
    deadline = time.monotonic() + processes.STOP_SECONDS
    while server.running and time.monotonic() < deadline:
        show(run)
        time.sleep(TICK_SECONDS)
    server.kill()
    show(run)
    processes.end_orphans()


def show(run: Run) -> None:
    for log in run.logs:
        for line in log.lines():
            print(line, flush=True)


def is_ready(address: Address) -> bool:
    connection = http.client.HTTPConnection(address.local, address.port, timeout=2)
    try:
        connection.request("GET", "/readyz", headers={"Host": urlsplit(address.public_url).netloc})
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def say(line: str, *, file: Any = None) -> None:
    print(f"penstock: {line}", file=file or sys.stdout, flush=True)


def run_and_exit() -> NoReturn:
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run_and_exit()
