"""Answers that are kept: the same question of the same owner is answered once, and nobody else's answer is ever given."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
import websockets.sync.client as websockets

from proxy import cache, keys
from proxy.metrics import registry
from tests.support import answers, faults
from tests.support.inprocess import PEPPERS, House
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

HELLO = [{"role": "user", "content": "hello there"}]


@pytest.fixture(scope="module")
def valkey() -> Iterator[Valkey]:
    with Valkey() as running:
        yield running


@pytest.fixture
def store(valkey: Valkey) -> Iterator[Any]:
    with redis.Redis(unix_socket_path=str(valkey.socket)) as client:
        client.flushall()
        yield client


@pytest.fixture
def kept(tmp_path: Path, settings: Any, valkey: Valkey, store: Any, upstream: Upstream) -> Iterator[House]:
    """A data plane with Redis, whose active provider is `upstream`, and whose first key keeps answers for a minute."""
    settings.PENSTOCK_PEPPERS = PEPPERS
    with House(tmp_path, redis_url=valkey.url) as house:
        first = house.provide("first", f"{upstream.url}/v1", models=("tiny",))
        house.activate((first, "tiny"))
        house.key = keeper(house, "keeper")
        yield house


def keeper(house: House, name: str, *, scope: str = "", **fields: Any) -> str:
    """A key that keeps answers; of an owner of its own, unless `scope` names one."""
    return house.issue(name, **{"cache_seconds": 60, "cache_scope": scope or f"key:{name}", **fields})


def ask(house: House, *, key: str = "", headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
    sent = {"model": "tiny", "messages": HELLO, "temperature": 0, **body}
    return httpx.post(
        f"{house.url}/v1/chat/completions",
        json={name: value for name, value in sent.items() if value is not None},
        headers={"Authorization": f"Bearer {key or house.key}", **(headers or {})},
        timeout=30,
    )


def said(response: httpx.Response) -> str:
    """What the header says about the cache."""
    return str(response.headers.get("x-penstock-cache", ""))


def warm(house: House, store: Any, **how: Any) -> httpx.Response:
    """Ask once, and wait until the answer is kept."""
    before = len(store.keys(f"{cache.PREFIX}*"))
    response = ask(house, **how)
    assert (response.status_code, said(response)) == (200, "miss")
    until(lambda: len(store.keys(f"{cache.PREFIX}*")) > before)
    return response


def until(condition: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_the_second_time_nobody_is_asked_and_the_answer_is_the_same(
    kept: House, store: Any, upstream: Upstream, stream: bool
) -> None:
    first = warm(kept, store, stream=stream)

    second = ask(kept, stream=stream)

    assert said(second) == "hit"
    assert second.content == first.content and second.headers["content-type"] == first.headers["content-type"]
    assert len(upstream.ledger.asked) == 1
    for name in ("x-penstock-provider", "x-penstock-model", "x-penstock-route"):
        assert second.headers[name] == first.headers[name]
    assert second.headers["x-penstock-attempts"] == "0"
    assert "no-store" in second.headers["cache-control"]


def test_a_hit_of_a_stream_is_whole_for_a_reader_of_events(kept: House, store: Any) -> None:
    warm(kept, store, stream=True)
    lines = [line for line in ask(kept, stream=True).text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert "".join(c["delta"].get("content", "") for each in chunks for c in each["choices"]) == "".join(
        answers.words(5)
    )
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_a_hit_is_recorded_with_the_tokens_of_the_first_time_and_without_cost_key_or_attempts(
    kept: House, store: Any, upstream: Upstream
) -> None:
    warm(kept, store)
    ask(kept)

    first, second = kept.records(2)

    for name in (
        "prompt_tokens",
        "completion_tokens",
        "tokens_source",
        "provider",
        "model",
        "route",
        "gateway_key",
        "status",
    ):
        assert second[name] == first[name], name
    assert second["prompt_tokens"] > 0 and second["status"] == "success"
    assert first["trace"]["cache"] == "miss" and first["api_key_id"] is not None
    assert (
        second["trace"] == {"candidates": ["first/tiny: taken"], "cache": "hit"}
        and second["api_key_id"] is None
    )


def test_attempts_and_tokens_of_providers_do_not_count_hits(kept: House, store: Any) -> None:
    def counted(name: str, **labels: str) -> float:
        return registry().get_sample_value(name, labels) or 0.0

    attempts = counted("penstock_attempts_total", provider="first", status="success")
    hits, misses = (counted("penstock_cache_total", result=each) for each in ("hit", "miss"))
    warm(kept, store)
    ask(kept)
    assert counted("penstock_attempts_total", provider="first", status="success") == attempts + 1
    assert counted("penstock_cache_total", result="hit") == hits + 1
    assert counted("penstock_cache_total", result="miss") == misses + 1


def test_a_key_that_keeps_nothing_neither_says_nor_stores_nor_finds_anything(
    kept: House, store: Any, upstream: Upstream
) -> None:
    warm(kept, store)
    plain = kept.issue("plain", cache_scope="key:keeper")
    before = store.keys("*")
    response = ask(kept, key=plain)
    assert "x-penstock-cache" not in response.headers
    assert len(upstream.ledger.asked) == 2 and store.keys("*") == before
    assert "cache" not in kept.records(2)[1]["trace"]


# -- whose answers


def test_r55_two_owners_with_the_same_request_never_share_an_answer(
    kept: House, store: Any, upstream: Upstream
) -> None:
    other = keeper(kept, "other")
    upstream.script(answers.ok(texts=["for the first"]), answers.ok(texts=["for the second"]))
    warm(kept, store)
    second = warm(kept, store, key=other)
    assert second.json()["choices"][0]["message"]["content"] == "for the second"
    assert ask(kept).json()["choices"][0]["message"]["content"] == "for the first"
    assert ask(kept, key=other).json() == second.json()


def test_the_keys_of_one_owner_share_their_answers(kept: House, store: Any, upstream: Upstream) -> None:
    one, two = (keeper(kept, name, scope="user:7") for name in ("one", "two"))
    warm(kept, store, key=one)
    assert said(ask(kept, key=two)) == "hit" and len(upstream.ledger.asked) == 1


def test_an_emptied_cache_has_nothing_and_fills_again(kept: House, store: Any) -> None:
    warm(kept, store)
    parts = keys.parse(kept.key)
    assert parts is not None
    callers = kept.watcher.snapshot.callers
    emptied = replace(callers[parts.key_id], cache_scope="key:keeper 2026-11-25")
    kept._change(callers={**callers, parts.key_id: emptied})
    warm(kept, store)
    assert said(ask(kept)) == "hit"


def test_a_revoked_key_gets_401_and_not_an_answer(kept: House, store: Any) -> None:
    warm(kept, store)
    kept.revoke(kept.key)
    response = ask(kept)
    assert response.status_code == 401 and "x-penstock-cache" not in response.headers


def test_a_key_that_may_not_use_the_model_gets_403_and_not_an_answer(kept: House, store: Any) -> None:
    bound = keeper(kept, "bound", scope="key:keeper", allowed_models=("other",))
    warm(kept, store)
    assert ask(kept, key=bound).status_code == 403


def test_hits_count_against_the_limits_of_the_key(kept: House, store: Any) -> None:
    limited = keeper(kept, "limited", requests_per_minute=2)
    warm(kept, store, key=limited)
    assert said(ask(kept, key=limited)) == "hit"
    assert ask(kept, key=limited).status_code == 429


# -- what is the same question

CHANGES: dict[str, dict[str, Any]] = {
    "another message": {"messages": [{"role": "user", "content": "hello there!"}]},
    "another role": {"messages": [{"role": "system", "content": "hello there"}]},
    "a limit": {"max_tokens": 5},
    "streamed": {"stream": True},
    "a seed": {"seed": 1},
    "by the provider's name": {"model": "first/tiny"},
    "the active one": {"model": None},
    "by the provider's id": {"provider_id": "first"},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_whatever_is_different_in_the_request_is_another_question(
    kept: House, store: Any, change: dict[str, Any]
) -> None:
    warm(kept, store)
    assert said(ask(kept, **change)) == "miss"
    assert said(ask(kept)) == "hit"


def test_the_order_of_names_and_the_white_space_are_no_difference(kept: House, store: Any) -> None:
    warm(kept, store)
    text = '{ "temperature":0,\n"messages": [{"content": "hello there", "role": "user"}], "model": "tiny"}'
    headers = {"Authorization": f"Bearer {kept.key}", "Content-Type": "application/json"}
    assert said(httpx.post(f"{kept.url}/v1/chat/completions", content=text, headers=headers)) == "hit"


def test_another_provider_behind_the_same_name_is_another_question(
    kept: House, store: Any, fallback: Upstream
) -> None:
    warm(kept, store, model=None)
    other = kept.provide("second", f"{fallback.url}/v1", models=("big",))
    kept.activate((other, "big"))
    response = ask(kept, model=None)
    assert (said(response), response.headers["x-penstock-provider"]) == ("miss", "second")


def test_a_route_whose_nodes_take_turns_has_one_answer(
    kept: House, store: Any, upstream: Upstream, fallback: Upstream
) -> None:
    other = kept.provide("second", f"{fallback.url}/v1", models=("tiny",))
    kept.route("both", 1, other)
    first = warm(kept, store, model="both")
    for _ in range(3):
        again = ask(kept, model="both")
        assert said(again) == "hit"
        assert again.headers["x-penstock-provider"] == first.headers["x-penstock-provider"]
    assert len(upstream.ledger.asked) + len(fallback.ledger.asked) == 1


@pytest.mark.parametrize("temperature", [None, 0.1, 1, False])
def test_only_what_is_asked_at_temperature_0_is_kept(
    kept: House, store: Any, temperature: float | None
) -> None:
    for _ in range(2):
        assert said(ask(kept, temperature=temperature)) == "miss"
    assert not store.keys(f"{cache.PREFIX}*")


def test_no_cache_asks_anew_and_the_new_answer_is_kept(kept: House, store: Any, upstream: Upstream) -> None:
    upstream.script(answers.ok(texts=["old"]), answers.ok(texts=["new"]))
    warm(kept, store)
    assert said(ask(kept, headers={"Cache-Control": "max-age=0, No-Cache"})) == "miss"
    until(lambda: "new" in ask(kept).text)
    assert len(upstream.ledger.asked) == 2


def test_no_store_neither_reads_nor_writes(kept: House, store: Any) -> None:
    assert said(ask(kept, headers={"Cache-Control": "no-store"})) == "miss"
    warm(kept, store)
    assert said(ask(kept, headers={"Cache-Control": "no-store"})) == "miss"
    assert len(store.keys(f"{cache.PREFIX}*")) == 1


# -- what is kept

NOT_WHOLE = {
    "an error": (answers.status(400), {}),
    "a broken stream": (faults.reset_after(3), {"stream": True}),
    "a filter": (answers.ok(finish="content_filter"), {}),
    "a stream without its end": (answers.ok(done=False), {"stream": True}),
    "no finish reason": (answers.ok(finish=None), {}),
    "a long answer": (answers.ok(texts=["x" * 300_000]), {}),
    "a long stream": (answers.ok(texts=["x" * 3000] * 100), {"stream": True}),
}


@pytest.mark.parametrize(("behaviour", "how"), NOT_WHOLE.values(), ids=NOT_WHOLE.keys())
def test_only_whole_answers_of_some_size_are_kept(
    kept: House, store: Any, upstream: Upstream, behaviour: Any, how: dict[str, Any]
) -> None:
    upstream.script(behaviour)
    ask(kept, **how)
    warm(kept, store, messages=[{"role": "user", "content": "something else"}])
    assert len(store.keys(f"{cache.PREFIX}*")) == 1


def test_several_choices_are_not_kept_since_a_filter_may_have_ended_one(
    kept: House, store: Any, upstream: Upstream
) -> None:
    reasons = ("stop", "content_filter")
    choices = [
        {"index": index, "finish_reason": reason, "message": {"role": "assistant", "content": "word"}}
        for index, reason in enumerate(reasons)
    ]
    upstream.script(answers.raw(json.dumps({"object": "chat.completion", "choices": choices}).encode()))
    assert "content_filter" in ask(kept, n=2).text
    # What is kept is kept in order, so what came first is there by now, too.
    warm(kept, store, messages=[{"role": "user", "content": "something else"}])

    assert said(ask(kept, n=2)) == "miss"

    assert len(store.keys(f"{cache.PREFIX}*")) == 1


def test_an_answer_that_another_provider_went_on_with_is_not_kept(
    kept: House, store: Any, upstream: Upstream, fallback: Upstream
) -> None:
    other = kept.provide("second", f"{fallback.url}/v1", models=("tiny",))
    kept.activate((1, "tiny"), (other, "tiny"))
    upstream.behave(faults.reset_after(3))
    response = ask(kept, model=None, stream=True)
    assert response.text.endswith("data: [DONE]\n\n") and len(fallback.ledger.asked) == 1
    warm(kept, store, messages=[{"role": "user", "content": "something else"}])
    assert len(store.keys(f"{cache.PREFIX}*")) == 1


def test_it_is_forgotten_in_time_and_by_redis(kept: House, store: Any) -> None:
    warm(kept, store)
    (name,) = store.keys(f"{cache.PREFIX}*")
    assert 50 < store.ttl(name) <= 60


def test_one_whose_time_is_over_is_not_given_even_if_redis_still_has_it(kept: House, store: Any) -> None:
    short = keeper(kept, "short", cache_seconds=1)
    warm(kept, store, key=short)
    (name,) = store.keys(f"{cache.PREFIX}*")
    store.persist(name)
    time.sleep(1.05)
    assert said(ask(kept, key=short)) == "miss"


def test_redis_sees_neither_the_question_nor_the_answer(kept: House, store: Any, upstream: Upstream) -> None:
    upstream.behave(answers.ok(texts=["CANARY-ANSWER"]))
    warm(kept, store, messages=[{"role": "user", "content": "CANARY-QUESTION"}])
    held = b"".join(name + (store.get(name) or b"") for name in store.keys("*"))
    assert len(held) > 200 and b"CANARY" not in held and b"tiny" not in held


def garbled(value: bytes, other: bytes) -> Iterator[bytes]:
    yield b""
    yield b"x"
    yield value[:-1]
    yield bytes([value[0] ^ 1]) + value[1:]
    yield value[:40] + bytes([value[40] ^ 1]) + value[41:]
    yield b"\x80\x04" * 5000
    yield b"x" * (cache.MAX_VALUE_BYTES + 100)
    yield other


def test_a_garbled_forged_or_moved_value_is_a_miss(kept: House, store: Any) -> None:
    warm(kept, store, messages=[{"role": "user", "content": "something else"}])
    (elsewhere,) = store.keys(f"{cache.PREFIX}*")
    warm(kept, store)
    (name,) = set(store.keys(f"{cache.PREFIX}*")) - {elsewhere}
    value, other = store.get(name), store.get(elsewhere)
    assert value is not None and other is not None
    for wrong in garbled(value, other):
        store.set(name, wrong)
        response = ask(kept, headers={"Cache-Control": "max-age=60"})
        assert (response.status_code, said(response)) == (200, "miss")
        until(lambda wrong=wrong: store.get(name) not in (wrong, None))  # type: ignore[misc]
    store.delete(name)
    store.lpush(name, "a list")
    assert said(ask(kept)) == "miss"


def test_after_a_rotation_of_the_data_key_nothing_is_found(kept: House, store: Any) -> None:
    from providers import crypto

    warm(kept, store)
    crypto.install(kept.keyring.with_new_key())
    assert said(ask(kept)) == "miss"


# -- Redis


def test_without_redis_every_question_is_a_miss(tmp_path: Path, settings: Any, upstream: Upstream) -> None:
    settings.PENSTOCK_PEPPERS = PEPPERS
    with House(tmp_path) as house:
        house.provide("first", f"{upstream.url}/v1")
        key = keeper(house, "keeper")
        for _ in range(2):
            response = ask(house, key=key)
            assert (response.status_code, said(response)) == (200, "miss")


def test_a_redis_that_is_silent_costs_its_time_limit_once_and_is_a_miss(
    tmp_path: Path, settings: Any, upstream: Upstream
) -> None:
    settings.PENSTOCK_PEPPERS = PEPPERS
    with Valkey() as valkey, House(tmp_path, redis_url=valkey.url) as house:
        house.provide("first", f"{upstream.url}/v1")
        key = keeper(house, "keeper")
        ask(house, key=key)
        valkey.pause()
        for _ in range(8):
            began = time.monotonic()
            assert said(ask(house, key=key)) == "miss"
        assert time.monotonic() - began < 1
        assert house.gateway.limits.local
        valkey.resume()


def test_one_process_keeps_no_more_than_its_share(kept: House, store: Any, monkeypatch: Any) -> None:
    warm(kept, store)
    (name,) = store.keys(f"{cache.PREFIX}*")
    monkeypatch.setattr(kept.gateway.cache, "_most", kept.gateway.cache._bytes + store.strlen(name) // 2)
    ask(kept, messages=[{"role": "user", "content": "one more"}])
    assert said(ask(kept, messages=[{"role": "user", "content": "one more"}])) == "miss"
    assert said(ask(kept)) == "hit"


# -- other ways in


def test_a_websocket_has_its_answers_kept_too(kept: House, store: Any, upstream: Upstream) -> None:
    def frames(id: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        headers = {"Authorization": f"Bearer {kept.key}"}
        with websockets.connect(f"ws://127.0.0.1:{kept.port}/ws/chat", additional_headers=headers) as socket:
            socket.send(json.dumps({"id": id, "model": "tiny", "messages": HELLO, "temperature": 0}))
            while not found or found[-1]["type"] == "chunk":
                found.append(json.loads(socket.recv(timeout=5)))
        return found

    first = frames("r1")
    until(lambda: bool(store.keys(f"{cache.PREFIX}*")))
    second = frames("r1")
    assert first == second and first[-1]["type"] == "done" and first[-1]["usage"]["completion_tokens"] == 5
    assert len(upstream.ledger.asked) == 1


def test_a_browser_may_ask_and_is_told(kept: House, settings: Any) -> None:
    settings.ALLOWED_ORIGINS = ["https://app.example.com"]
    origin = {"Origin": "https://app.example.com"}
    assert "x-penstock-cache" in ask(kept, headers=origin).headers["access-control-expose-headers"]
    asked = httpx.options(f"{kept.url}/v1/chat/completions", headers=origin)
    assert "cache-control" in asked.headers["access-control-allow-headers"]
