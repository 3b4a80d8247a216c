"""R54, R55: what callers say is kept only where a key says so, sealed, and given to nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import redis

from tests.support.answers import ok
from tests.support.gateway import Gateway
from tests.support.rows import all_rows, files_with, spellings
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

ASKED = "CANARY-asked-7f3a91c2"
SAID = "CANARY-said-e05b44d8"
BODY = {"model": "tiny", "temperature": 0, "messages": [{"role": "user", "content": ASKED}]}


def until(condition: Callable[[], object], gateway: Gateway, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, gateway.logs()[-3000:]
        time.sleep(0.1)


def texts(gateway: Gateway) -> list[str]:
    return all_rows(gateway)["proxy_textrecord"]


def in_clear(gateway: Gateway, store: Any) -> list[str]:
    """Where a canary is: files below the data directory and logs, rows, and what Redis holds."""
    found = []
    for word in (ASKED, SAID):
        found += files_with(gateway.folder, word)
        forms = spellings(word)
        rows = [text for rows in all_rows(gateway).values() for text in rows]
        held = [name + (store.dump(name) or b"") + (_value(store, name)) for name in store.keys("*")]
        found += [each[:80] for each in rows if any(form in each.encode() for form in forms)]
        found += [repr(each[:80]) for each in held if any(form in each for form in forms)]
    return found


def _value(store: Any, name: bytes) -> bytes:
    value = store.get(name) if store.type(name) == b"string" else None
    return value if isinstance(value, bytes) else b""


def test_r54_texts_and_answers_that_are_kept_are_nowhere_in_clear() -> None:
    """Two keys of the product: one keeps nothing, one keeps everything; the database, the spool, Redis and the logs are searched."""
    with (
        Upstream(ok(texts=[SAID])) as upstream,
        Valkey() as valkey,
        Gateway(redis=valkey, programs=["drainer"], env={"LOG_LEVEL": "DEBUG"}) as gateway,
        redis.Redis(unix_socket_path=str(valkey.socket)) as store,
    ):
        plain = gateway.provide(f"{upstream.url}/v1")
        keeps = {"record_text": True, "cache_seconds": 600}
        keeper = gateway.provide(f"{upstream.url}/v1", slug="second", active=False, limits=keeps)

        with gateway.client(plain) as client:
            for stream in (True, False):
                client.post("/v1/chat/completions", json={**BODY, "stream": stream}).raise_for_status()
        with gateway.client(keeper) as client:
            for stream in (True, False):
                for _ in range(2):
                    answer = client.post("/v1/chat/completions", json={**BODY, "stream": stream})
                    assert SAID in answer.text
                    # The first answer is on its way to Redis when the second question comes; it may miss, and that is fine.
                    until(lambda: store.keys("penstock:cache:*"), gateway)
        assert not in_clear(gateway, store)
        until(lambda: len(texts(gateway)) == 4, gateway)
        assert len(store.keys("penstock:cache:*")) == 2
        assert not in_clear(gateway, store)
        opened = gateway.shell(
            "from providers import keyring; from proxy import texts; from proxy.models import TextRecord\n"
            "keyring.load(); print(*(texts.read(row) for row in TextRecord.objects.all()))"
        )
        assert opened.count(ASKED) == opened.count(SAID) == 4


def test_r54_a_default_installation_keeps_nothing_of_what_is_said() -> None:
    with (
        Upstream(ok(texts=[SAID])) as upstream,
        Valkey() as valkey,
        Gateway(redis=valkey, programs=["drainer"]) as gateway,
        redis.Redis(unix_socket_path=str(valkey.socket)) as store,
    ):
        key = gateway.provide(f"{upstream.url}/v1", limits={"requests_per_minute": 100})
        with gateway.client(key) as client:
            for _ in range(2):
                answer = client.post("/v1/chat/completions", json=BODY)
                assert "x-penstock-cache" not in answer.headers
        until(lambda: len(all_rows(gateway)["proxy_usagerecord"]) == 2, gateway)
        assert len(upstream.ledger.asked) == 2
        assert not store.keys("penstock:cache:*") and not texts(gateway) and not in_clear(gateway, store)
