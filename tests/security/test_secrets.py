"""Secrets that do not open, processes that leave nothing behind, and an installation that begins with nobody: R01, R03, R09, R60."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
from prometheus_client import REGISTRY

from tests.security.conftest import log_in
from tests.support.api import V1
from tests.support.gateway import Gateway
from tests.support.inprocess import House
from tests.support.rows import spellings
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

DUMPABLE = Path(__file__).parent / "dumpable"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def flipped(sealed: str) -> str:
    middle = sealed.rindex(".") + 20
    return sealed[:middle] + ("A" if sealed[middle] != "A" else "B") + sealed[middle + 1 :]


def spoil(house: House, number: int) -> None:
    """Change one character of the sealed key of a provider."""
    upstreams = dict(house.watcher.snapshot.upstreams)
    key = upstreams[number].credentials[0]
    spoiled = replace(key, stored=flipped(key.stored))
    upstreams[number] = replace(upstreams[number], credentials=(spoiled,))
    house._change(upstreams=upstreams)


def failures() -> float:
    return REGISTRY.get_sample_value("credential_decrypt_failures_total") or 0.0


def test_r03_a_changed_secret_is_503_at_once_and_is_counted_once(house: House, upstream: Upstream) -> None:
    broken = house.provide("broken", f"{upstream.url}/v1", models=("broken-model",))
    house.provide("well", f"{upstream.url}/v1", models=("well-model",))
    spoil(house, broken)
    before, began = failures(), time.monotonic()

    answer = house.ask("broken-model")

    assert time.monotonic() - began < 1
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "credential_unavailable")
    assert "Traceback" not in answer.text and "retry-after" in answer.headers
    assert failures() == before + 1
    assert not upstream.ledger.records
    assert house.ask("well-model").status_code == 200
    assert failures() == before + 1


SPOIL = """
from providers.models import ApiKey
from providers.fields import raw
from tests.security.test_secrets import flipped
for key in ApiKey.objects.filter(provider__slug="broken"):
    ApiKey.objects.filter(pk=key.pk).update(secret=flipped(raw(key.secret)))
"""


TOLD = """
import json
from audit.models import Entry
found = Entry.objects.filter(action="undecryptable_key").values_list("seq", "entity_type", "entity_id", "via")
print(json.dumps(list(found)))
"""


def told(gateway: Gateway) -> list[tuple[int, str, str, str]]:
    """The audit entries about keys that do not open."""
    return [tuple(one) for one in json.loads(gateway.shell(TOLD).splitlines()[-1])]


def test_r03_whatever_many_requests_and_workers_find_it_is_one_audit_entry(upstream: Upstream) -> None:
    """On the product, as shipped: two workers, requests one after another, and an administrator who mends it."""
    url = f"{upstream.url}/v1"
    with Gateway(start=False, env={"WEB_CONCURRENCY": "2"}) as gateway:
        gateway.provide(url, slug="well", models=["well-model"], api_key="sk-well-0123456789")
        key = gateway.provide(
            url,
            slug="broken",
            kind="groq",
            models=["broken-model"],
            api_key="sk-broken-0123456789",
            active=False,
            allow_private=True,
        )
        gateway.shell(SPOIL)
        gateway.start()
        with log_in(gateway) as root, gateway.client(key) as client:

            def ask(model: str) -> httpx.Response:
                # A connection of its own each time, so that both workers are met.
                headers = {"connection": "close"}
                return client.post("/v1/chat/completions", json={**HELLO, "model": model}, headers=headers)

            answer = ask("broken-model")
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "credential_unavailable")
            deadline = time.monotonic() + 20
            while not (entries := told(gateway)):
                assert time.monotonic() < deadline, gateway.logs()
            assert [entry[1:] for entry in entries] == [("api_key", entries[0][2], "system")]
            # Until it is known to both workers the configuration is not yet that of the entry; then it stays.
            while {ask("well-model").headers["x-penstock-config"] for _ in range(10)} != {str(entries[0][0])}:
                assert time.monotonic() < deadline
            assert {ask("broken-model").status_code for _ in range(40)} == {503}
            time.sleep(1.5)  # the watchers look four times a second, and tell once a second
            assert ask("well-model").headers["x-penstock-config"] == str(entries[0][0])
            path = f"{V1}/api-keys/{entries[0][2]}"
            assert root.get(path).json()["undecryptable_at"]
            assert (
                root.patch(path, json={"api_key": "sk-mended-0123456789"}).json()["undecryptable_at"] is None
            )
            while ask("broken-model").status_code != 200:
                assert time.monotonic() < deadline + 10
            assert told(gateway) == entries
        assert "Traceback" not in gateway.logs()


def test_r03_the_counter_is_among_the_metrics_of_the_product(plain: Gateway) -> None:
    assert "credential_decrypt_failures_total" in httpx.get(f"{plain.url}/metrics").text


PROGRAMS = ("web", "worker", "beat", "drainer")


@pytest.fixture(scope="module")
def witnesses(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file for each process of `hardened`: whether it can be dumped."""
    return tmp_path_factory.mktemp("dumpable")


@pytest.fixture(scope="module")
def hardened(witnesses: Path) -> Iterator[Gateway]:
    """Every program that opens secrets, as `make run` starts them."""
    witness = {"PYTHONPATH": str(DUMPABLE), "DUMPABLE_FOLDER": str(witnesses)}
    with Valkey() as valkey, Gateway(redis=valkey, programs=PROGRAMS[1:], env=witness) as gateway:
        yield gateway


@pytest.mark.parametrize("program", PROGRAMS)
def test_r09_no_program_leaves_a_core_or_shows_its_memory_to_anybody(
    hardened: Gateway, witnesses: Path, program: str
) -> None:
    process = hardened.process(program)
    deadline = time.monotonic() + 30
    # The worker's pool opens secrets as well, so its children count.
    while len(family := process.family()) < (2 if program == "worker" else 1) or {
        (witnesses / str(pid)).read_text() if (witnesses / str(pid)).exists() else "" for pid in family
    } != {"0"}:
        assert time.monotonic() < deadline, hardened.logs(program)
        time.sleep(0.05)
    for pid in family:
        assert re.search(r"Max core file size +0 +0 ", Path(f"/proc/{pid}/limits").read_text())
    before = {path.name for path in Path.cwd().iterdir()}
    for pid in family:
        os.kill(pid, signal.SIGSEGV)
    assert process.wait(10) == -signal.SIGSEGV
    assert {path.name for path in Path.cwd().iterdir()} - before == set()


def test_r01_redis_holds_no_secret() -> None:
    """Every key as Redis itself would dump it, after requests, limits, probes and queued tasks."""
    import redis

    provider_key = "sk-CANARY-5d1f0a7be2c94e6f8b3a"
    with (
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(redis=valkey, programs=["beat"]) as gateway,
        redis.Redis(unix_socket_path=str(valkey.socket)) as store,
    ):
        limits = {"requests_per_minute": 100, "tokens_per_minute": 100_000, "max_concurrency": 5}
        key = gateway.provide(f"{upstream.url}/v1", api_key=provider_key, limits=limits)
        with gateway.client(key) as client:
            client.post("/v1/chat/completions", json={**HELLO, "model": "tiny"}).raise_for_status()
        deadline = time.monotonic() + 20
        while not store.llen("celery"):
            assert time.monotonic() < deadline, "beat queued nothing"
            time.sleep(0.05)
        names = store.keys("*")
        assert any(name.startswith(b"penstock:limit:") for name in names)
        held = b"".join(name + (store.dump(name) or b"") + _plain(store, name) for name in names)
    secrets = (
        provider_key,
        key,
        key[19:51],
        gateway.env["PENSTOCK_ENCRYPTION_KEY"],
        gateway.env["SECRET_KEY"],
    )
    assert not [secret for secret in secrets if any(form in held for form in spellings(secret))]


def _plain(store: object, name: bytes) -> bytes:
    """A key's content without the compression of a dump."""
    kind = store.type(name)  # type: ignore[attr-defined]  # redis-py's own client, whose stubs say otherwise
    read = {
        b"string": lambda: store.get(name),  # type: ignore[attr-defined]
        b"list": lambda: store.lrange(name, 0, -1),  # type: ignore[attr-defined]
        b"hash": lambda: store.hgetall(name),  # type: ignore[attr-defined]
        b"set": lambda: store.smembers(name),  # type: ignore[attr-defined]
        b"zset": lambda: store.zrange(name, 0, -1),  # type: ignore[attr-defined]
    }
    # A key may have run out between our questions.
    return b"" if kind == b"none" else repr(read[kind]()).encode()


def test_r60_a_new_installation_has_neither_people_nor_keys(plain: Gateway) -> None:
    with Gateway(start=False) as fresh:
        printed = fresh.shell(
            "from django.contrib.auth.models import User; from proxy.models import GatewayKey\n"
            "from providers.models import ApiKey, Provider\n"
            "print(User.objects.count(), GatewayKey.objects.count(), ApiKey.objects.count(),"
            " Provider.objects.filter(enabled=True).count())"
        )
    assert printed.splitlines()[-1] == "0 0 0 0"
    with plain.client() as client:
        for name, password in (
            ("admin", "admin"),
            ("root", "root"),
            ("admin", "penstock"),
            ("admin", "123456"),
        ):
            answer = client.post("/api/v1/auth/token", json={"username": name, "password": password})
            assert answer.status_code == 401
        for key in ("sk-1234", "pen_live_" + "0" * 42 + "_000000", "sk-test", "changeme"):
            assert client.get("/v1/models", headers={"x-api-key": key}).status_code == 401
