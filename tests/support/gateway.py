"""The product itself, started the way its users start it: migrated, with fresh secrets, in processes of its own.

    with Gateway() as gateway, Upstream() as upstream:
        key = gateway.provide(upstream.url + "/v1", models=["tiny"])
        with gateway.client(key) as client:
            client.post("/v1/chat/completions", json={...})

Migrating takes seconds, so it is done once per session and database; every gateway starts from a copy. For the data plane alone,
without processes and without a database, see `tests.support.inprocess`.
"""

from __future__ import annotations

import functools
import json
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import httpx

from tests.support.inside import inside
from tests.support.installation import fresh_secrets
from tests.support.ports import LOOPBACK, free_port
from tests.support.postgres import Postgres, create_database, drop_database
from tests.support.processes import LOG_TAIL, REPOSITORY, Process
from tests.support.template import (
    Database,
    base_settings,
    default_database,
    migrate,
    session_server,
    template_of,
)
from tests.support.valkey import Valkey

READY_TIMEOUT = 40.0
SETTLE_TIMEOUT = 10.0
CHANGE_SECONDS = 1.5
"""A change is known to every worker within a second; none of several can be asked alone."""
STOP_TIMEOUT = 45.0

_celery = (sys.executable, "-m", "celery", "--quiet", "--app", "config.celery")
PROGRAMS: Mapping[str, Sequence[str]] = {
    "web": (sys.executable, "manage.py", "serve"),
    "worker": (
        *_celery,
        "worker",
        "--concurrency=1",
        "--without-gossip",
        "--without-mingle",
        "--loglevel=INFO",
    ),
    "beat": (*_celery, "beat", "--pidfile=", "--loglevel=INFO"),
    "drainer": (sys.executable, "manage.py", "drain_usage", "--follow"),
}


class Gateway:
    """One installation: a data directory, a database, secrets, and the programs that run on it.

    database: "sqlite", "postgresql" (a database of its own on the session's server; default: what PENSTOCK_TEST_DATABASE
    says) or a `Postgres` of the test's own, to break. env: settings over the defaults. redis: its address or a `Valkey`; None:
    limits live in the process. programs: what runs beside the web server ("worker", "beat", "drainer"). start: False only
    prepares, so that `provide` and `manage` can fill the database first.
    """

    def __init__(
        self,
        *,
        database: Database | Postgres | None = None,
        env: Mapping[str, str] | None = None,
        redis: str | Valkey | None = None,
        programs: Collection[str] = (),
        start: bool = True,
    ) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="penstock-gateway-"))
        self.port = free_port()
        self.programs = ("web", *programs)
        self._running: dict[str, Process] = {}
        self._undo: list[Callable[[], None]] = [
            functools.partial(shutil.rmtree, self.folder, ignore_errors=True)
        ]
        try:
            self.env = self._settings(database or default_database(), dict(env or {}), redis)
            if start:
                self.start()
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def data_dir(self) -> Path:
        return self.folder / "data"

    # -- processes -----------------------------------------------------------------------------------------------------

    def start(self, *programs: str) -> None:
        """Start these programs (default: all that are not running) and wait until the gateway is ready."""
        for name in programs or self.programs:
            if name not in self._running or not self._running[name].alive:
                log = self.folder / f"{name}.log"
                self._running[name] = Process(
                    PROGRAMS[name], name=name, log=log, env=self.env, cwd=REPOSITORY
                )
        if self.process().alive:
            self.process().wait_until(self.ready, timeout=READY_TIMEOUT, every=0.05)

    def process(self, program: str = "web") -> Process:
        return self._running[program]

    def ready(self) -> bool:
        """Whether /readyz says 200."""
        try:
            return httpx.get(f"{self.url}/readyz", timeout=2).status_code == 200
        except httpx.HTTPError:
            return False

    def restart(self, program: str = "web") -> int:
        """Stop a program as an administrator would and start it again; its exit code."""
        code = self.process(program).stop(timeout=STOP_TIMEOUT)
        self.start(program)
        return code

    def kill9(self, program: str = "web") -> None:
        """SIGKILL to a program and its children; `start` brings it back on the same data."""
        self.process(program).kill()

    def halt(self) -> None:
        """End the programs in the order of the real supervisor, web first, and keep the data."""
        for name in ("web", "beat", "worker", "drainer"):
            if name in self._running:
                self._running[name].stop(timeout=STOP_TIMEOUT)

    def stop(self) -> None:
        """End the programs at once and remove data and database."""
        for process in self._running.values():
            process.kill()
        while self._undo:
            self._undo.pop()()

    def logs(self, program: str | None = None) -> str:
        """What a program wrote, or all of them."""
        names = [program] if program else [name for name in PROGRAMS if name in self._running]
        return "".join(self._running[name].logs() for name in names)

    # -- commands ------------------------------------------------------------------------------------------------------

    def manage(
        self, *args: str, check: bool = True, given: str = "", env: Mapping[str, str] | None = None
    ) -> str:
        """Run `manage.py` with these arguments; what it printed. AssertionError with all of it when it fails."""
        done = self.run_manage(*args, given=given, env=env)
        if check and done.returncode:
            raise AssertionError(
                f"manage.py {args[0]} ended with {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done.stdout

    def run_manage(
        self, *args: str, given: str = "", env: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """The same, with exit code, stdout and stderr apart. given: its input. env: over this gateway's settings."""
        command = [sys.executable, "manage.py", *args]
        return subprocess.run(
            command,
            cwd=REPOSITORY,
            env={**self.env, **(env or {})},
            input=given,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    def shell(self, code: str) -> str:
        """Run Python code inside Django, with this gateway's settings; what it printed."""
        return inside().run(code, self.env)

    def provide(
        self,
        base_url: str,
        *,
        slug: str = "upstream",
        kind: str = "openai-compatible",
        api_key: str = "",
        models: Sequence[str] = ("tiny",),
        purpose: str = "chat",
        active: bool = True,
        key: bool = True,
        limits: Mapping[str, Any] | None = None,
        **fields: Any,
    ) -> str:
        """Add an enabled provider with its models and issue a gateway key; the key.

        active: make it the active provider of the purpose, or, when there is one, its next fallback. key: False issues none.
        limits: columns of the gateway key. fields: more columns of the provider.
        """
        columns = {
            "slug": slug,
            "name": slug,
            "kind": kind,
            "base_url": base_url,
            f"use_for_{purpose}": True,
            **fields,
        }
        given = {
            "provider": columns,
            "api_key": api_key,
            "models": list(models),
            "purposes": [purpose],
            "active": purpose if active else "",
            "key": key,
            "limits": dict(limits or {}),
        }
        printed = self.shell(f"from tests.support.fill import provide; provide({json.dumps(given)!r})")
        issued = str(json.loads(printed.splitlines()[-1])["key"])
        if issued and "web" in self._running and self.process().alive:
            self.wait_for_key(issued)
        return issued

    def wait_for_key(self, key: str) -> None:
        """Until the gateway knows a key, and so the configuration that was saved with or before it."""
        deadline = time.monotonic() + SETTLE_TIMEOUT
        with self.client(key) as client:
            while client.get("/v1/models").status_code != 200:
                if time.monotonic() > deadline:
                    raise AssertionError(
                        f"the key is not known after {SETTLE_TIMEOUT} s\n{self.logs()[-LOG_TAIL:]}"
                    )
                time.sleep(0.05)
        if int(self.env.get("WEB_CONCURRENCY", "1")) > 1:
            time.sleep(CHANGE_SECONDS)

    def client(self, key: str = "", **options: Any) -> httpx.Client:
        """An httpx client of this gateway that sends the key, if one is given."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.Client(**{"base_url": self.url, "headers": headers, "timeout": 30, **options})

    # -- preparation ---------------------------------------------------------------------------------------------------

    def _settings(
        self, database: Database | Postgres, env: dict[str, str], redis: str | Valkey | None
    ) -> dict[str, str]:
        """Make the database and say in the environment where everything is."""
        settings = base_settings(self.data_dir, self.port, health="beat" in self.programs)
        if redis is not None:
            settings["REDIS_URL"] = redis if isinstance(redis, str) else redis.url
        if isinstance(database, Postgres) or "PENSTOCK_ENCRYPTION_KEY" in env or "DATABASE_URL" in env:
            return self._migrated({**settings, **fresh_secrets()}, database, env)
        template = template_of(database)
        shutil.copytree(template.data_dir, self.data_dir)
        settings.update(fresh_secrets(), PENSTOCK_ENCRYPTION_KEY=template.encryption_key)
        if database == "postgresql":
            settings["DATABASE_URL"] = self._own_database(session_server(), template=template.database)
        return {**settings, **env}

    def _migrated(
        self, settings: dict[str, str], database: Database | Postgres, env: dict[str, str]
    ) -> dict[str, str]:
        """A database without a template: on a server or under a key that no other gateway uses."""
        if "DATABASE_URL" not in env and database != "sqlite":
            server = database.url if isinstance(database, Postgres) else session_server()
            settings["DATABASE_URL"] = self._own_database(server, template="template0")
        settings.update(env)
        migrate(settings)
        return settings

    def _own_database(self, server: str, *, template: str) -> str:
        name = f"penstock_{secrets.token_hex(6)}"
        address = create_database(server, name, template=template)
        self._undo.append(functools.partial(_drop_quietly, server, name))
        return address


def _drop_quietly(server: str, name: str) -> None:
    import psycopg

    try:
        drop_database(server, name)
    except psycopg.OperationalError:
        return  # the test has ended its server
