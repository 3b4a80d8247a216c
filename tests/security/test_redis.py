"""R56: whoever can write to Redis can neither run code nor get in, and does not stop the product."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from tests.support.gateway import Gateway
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
STRANGER = "pen_live_0000000000" + "0" * 32 + "_000000"


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self._path}",)


def pickled_message(payload: bytes) -> str:
    """A message whose body says that it is a pickle."""
    properties = {
        "body_encoding": "base64",
        "delivery_info": {"exchange": "", "routing_key": "celery"},
        "delivery_tag": "forged",
    }
    headers = {"task": "providers.tasks.probe_due", "id": "forged"}
    return json.dumps(
        {
            "body": payload.hex(),
            "headers": headers,
            "properties": properties,
            "content-type": "application/x-python-serialize",
            "content-encoding": "binary",
        }
    )


def poison(store: Any, payload: bytes) -> None:
    """Put the payload into everything there is, in its own type."""
    for name in store.keys("*"):
        kind = store.type(name)
        if kind == b"hash":
            store.hset(name, mapping=dict.fromkeys(store.hkeys(name), payload))
        elif kind == b"list":
            for index in range(store.llen(name)):
                store.lset(name, index, payload)
        elif kind == b"set":
            store.sadd(name, payload)
        elif kind == b"zset":
            store.zadd(name, {payload: 1})
        else:
            store.set(name, payload)
    store.lpush("celery", payload, b"x", b"{}", b'{"properties":{}}', pickled_message(payload))


def overwrite(store: Any, payload: bytes) -> None:
    """Put the payload in the place of everything there is, whatever its type was."""
    names = {*store.keys("*"), b"celery", b"unacked", b"unacked_index", b"_kombu.binding.celery"}
    for name in names:
        store.set(name, payload)
    for name in ("session:root", "key:0000000000", "auth:0000000000", "penstock:auth:0000000000"):
        store.set(name, b'{"ok": true, "is_superuser": true}')


def wait(condition: Callable[[], bool], gateway: Gateway, seconds: float = 40.0) -> None:
    """Until the condition holds; what ended meanwhile is started again, as the supervisor does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, gateway.logs()[-6000:]
        for name in gateway.programs:
            if not gateway.process(name).alive:
                assert name == "worker", f"{name} ended\n{gateway.logs(name)[-3000:]}"
                gateway.start(name)
        time.sleep(0.1)


def test_r56_what_is_written_into_redis_is_not_run_not_believed_and_does_not_stop_us(tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    payload = pickle.dumps(Touch(touched), 0)
    with (
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(
            redis=valkey,
            programs=["worker", "beat", "drainer"],
            env={"HEALTH_CHECK_INTERVAL_SECONDS": "1"},
        ) as gateway,
        redis.Redis(unix_socket_path=str(valkey.socket)) as store,
    ):
        limits = {"requests_per_minute": 1000, "tokens_per_minute": 1_000_000, "max_concurrency": 20}
        key = gateway.provide(f"{upstream.url}/v1", limits=limits)

        def probes() -> int:
            return len([record for record in upstream.ledger.records if record.method == "GET"])

        with gateway.client(key) as client:
            wait(lambda: probes() > 1, gateway)
            for attack in (poison, overwrite):
                client.post("/v1/chat/completions", json=HELLO).raise_for_status()
                attack(store, payload)
                for _ in range(5):
                    client.post("/v1/chat/completions", json=HELLO).raise_for_status()
                before = probes()
                wait(lambda before=before: probes() > before + 2, gateway)  # type: ignore[misc]
            assert (
                client.get("/v1/models", headers={"Authorization": f"Bearer {STRANGER}"}).status_code == 401
            )
            for cookie in ("penstock_session=root", "sessionid=root"):
                answer = client.get("/api/v1/providers", headers={"Authorization": "", "Cookie": cookie})
                assert answer.status_code == 401
    assert not touched.exists()
