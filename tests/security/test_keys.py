"""Gateway keys against guessing, timing, and reaching those who must not see them: R10 to R14, R17."""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import User
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils.crypto import pbkdf2
from websockets.sync.client import connect

from proxy import auth, keys
from proxy.auth import Caller
from proxy.errors import InvalidApiKey
from tests.support.api import V1, anybody
from tests.support.inprocess import PEPPERS, House
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

PADDING = (" ", "\t", "\n", "\r\n", "\0", "\u00a0", "\ufeff", ".", "=")
HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}


def fresh() -> str:
    return keys.compose(keys.random_text(10), keys.random_text(32))


def caller_of(key: str) -> Caller:
    parts = keys.parse(key)
    assert parts is not None
    return Caller(1, parts.key_id, "first", "", keys.digest(parts.secret, PEPPERS[1]), 1)


# -- form (R10, R11) ---------------------------------------------------------------------------------------------------


def test_r10_without_the_pepper_no_plain_hash_of_a_key_is_what_is_stored() -> None:
    key = fresh()
    parts = keys.parse(key)
    assert parts is not None
    stored = caller_of(key).digest
    for text in (key, parts.secret, parts.key_id + parts.secret):
        assert hashlib.sha256(text.encode()).hexdigest() != stored
    assert stored != keys.digest(parts.secret, PEPPERS[1] + b"x")
    assert stored not in repr(caller_of(key))


def test_r11_a_key_has_the_published_form_and_at_least_160_random_bits() -> None:
    key = fresh()
    assert re.fullmatch(r"pen_live_[0-9A-Za-z]{10}[0-9A-Za-z]{32}_[0-9A-Za-z]{6}", key)
    assert 62**32 > 2**160
    assert len({fresh()[19:51] for _ in range(1000)}) == 1000


def test_r11_any_changed_character_is_noticed() -> None:
    key = fresh()
    for position, old in enumerate(key):
        for new in keys.ALPHABET:
            if new != old:
                assert keys.parse(key[:position] + new + key[position + 1 :]) is None


class Untouchable(dict[str, Caller]):
    """Callers that nobody may look up."""

    def get(self, *args: Any) -> Any:
        raise AssertionError("a key with a wrong checksum was looked up")

    __getitem__ = get


def wrong_checksums(count: int) -> list[str]:
    return [fresh()[:-1] + "!" if n % 2 else _last_changed(fresh()) for n in range(count)]


def _last_changed(key: str) -> str:
    return key[:-1] + ("a" if key[-1] != "a" else "b")


def test_r11_a_thousand_keys_with_a_wrong_checksum_are_refused_without_any_lookup() -> None:
    for key in wrong_checksums(1000):
        with pytest.raises(InvalidApiKey):
            auth.authenticate(key, Untouchable(), PEPPERS)


def test_r11_a_wrong_checksum_costs_redis_nothing(tmp_path: Any, settings: Any) -> None:
    settings.PENSTOCK_PEPPERS = PEPPERS
    import redis

    with (
        Valkey() as valkey,
        House(tmp_path, redis_url=valkey.url) as house,
        redis.Redis.from_url(valkey.url) as asked,
        httpx.Client(base_url=house.url) as client,
    ):
        before = asked.info("commandstats")
        for key in wrong_checksums(200):
            answer = client.post("/v1/chat/completions", json=HELLO, headers={"x-api-key": key})
            assert answer.status_code == 401
        after = asked.info("commandstats")
    asks = [name for name in after if "eval" in name and after[name] != before.get(name)]
    assert not asks


@pytest.mark.django_db
def test_r11_a_gateway_key_costs_the_control_plane_no_query() -> None:
    client = anybody()
    with CaptureQueriesContext(connection) as queries:
        for key in [*wrong_checksums(50), fresh()]:
            assert (
                client.get(f"{V1}/providers", headers={"Authorization": f"Bearer {key}"}).status_code == 401
            )
    assert not queries.captured_queries


# -- timing (R14) ------------------------------------------------------------------------------------------------------


def test_r13_of_a_thousand_keys_that_share_their_beginnings_each_is_only_itself() -> None:
    """Ids that differ in one character only, secrets that are the same but for their end, and the same secret twice."""
    stem, secret = keys.random_text(8), keys.random_text(32)
    ids = [f"{stem}{number:02d}" for number in range(100)]
    wholes = {
        keys.compose(key_id, secret[: 32 - cut] + keys.random_text(cut)): key_id
        for key_id in ids
        for cut in range(10)
    }
    assert len(wholes) > 900
    callers, numbers = {}, dict(zip(ids, range(100), strict=True))
    for whole, key_id in wholes.items():
        callers[key_id] = replace(caller_of(whole), id=numbers[key_id])  # of each id, one key is the good one
    good = {key_id: next(w for w, k in reversed(wholes.items()) if k == key_id) for key_id in ids}
    for whole, key_id in wholes.items():
        if whole == good[key_id]:
            assert auth.authenticate(whole, callers, PEPPERS) is callers[key_id]
        else:
            assert whole[:40] == f"pen_live_{key_id}{secret[:21]}"
            with pytest.raises(InvalidApiKey):
                auth.authenticate(whole, callers, PEPPERS)


def test_r13_two_keys_that_share_forty_characters_have_each_their_own_limits(
    house: House, upstream: Upstream
) -> None:
    house.provide("first", f"{upstream.url}/v1")
    secret = keys.random_text(32)
    stem = keys.random_text(9)
    narrow, wide = (keys.compose(f"{stem}{end}", secret) for end in "ab")
    assert narrow[19:51] == wide[19:51]
    house.admit(replace(caller_of(narrow), id=11, name="narrow", requests_per_minute=1))
    house.admit(replace(caller_of(wide), id=12, name="wide"))
    assert [house.ask(key=narrow).status_code for _ in range(2)] == [200, 429]
    assert [house.ask(key=wide).status_code for _ in range(3)] == [200] * 3
    assert "x-ratelimit-limit-requests" not in house.ask(key=wide).headers
    assert {house.watcher.snapshot.callers[f"{stem}{end}"].name for end in "ab"} == {"narrow", "wide"}


def test_r13_a_key_in_other_letters_or_with_anything_around_it_is_refused() -> None:
    key = fresh()
    callers = {caller_of(key).key_id: caller_of(key)}
    assert auth.authenticate(key, callers, PEPPERS)
    wrong = {
        key.upper(),
        key.lower(),
        key.swapcase(),
        key[:19].lower() + key[19:],
        key[:9] + key[9:].swapcase(),
    } - {key}
    wrong |= {f"{before}{key}{after}" for before in ("", *PADDING) for after in ("", *PADDING)} - {key}
    for text in wrong:
        with pytest.raises(InvalidApiKey):
            auth.authenticate(text, callers, PEPPERS)


@pytest.mark.parametrize("header", ["authorization", "x-api-key", "api-key", "x-goog-api-key"])
def test_r13_nor_does_a_request_get_in_with_one(house: House, header: str) -> None:
    scheme = "Bearer " if header == "authorization" else ""

    def status(text: str) -> int:
        return httpx.get(
            f"{house.url}/v1/models", headers={header: f"{scheme}{text}".encode("latin-1")}
        ).status_code

    assert status(house.key) == 200
    for text in (house.key.swapcase(), f"_{house.key}", f"{house.key},{house.key}", f'"{house.key}"'):
        assert status(text) == 401


def test_r14_time_does_not_tell_an_unknown_key_from_a_wrong_one() -> None:
    """Medians over 5,000 interleaved samples differ by less than 2 % or 50 microseconds, with and without a rotated key."""
    key = fresh()
    parts = keys.parse(key)
    assert parts is not None
    first = ("a" if parts.secret[0] != "a" else "b") + parts.secret[1:]
    last = parts.secret[:-1] + ("a" if parts.secret[-1] != "a" else "b")
    tried = [
        fresh(),
        keys.compose(parts.key_id, first),
        keys.compose(parts.key_id, last),
    ]
    callers = {parts.key_id: caller_of(key)}
    samples: list[list[int]] = [[] for _ in tried]
    for _ in range(5000):
        for text, times in zip(tried, samples, strict=True):
            began = time.perf_counter_ns()
            try:
                auth.authenticate(text, callers, PEPPERS)
            except InvalidApiKey:
                times.append(time.perf_counter_ns() - began)
    medians = [statistics.median(times) for times in samples]
    assert len(samples[0]) == len(samples[1]) == len(samples[2]) == 5000
    assert max(medians) - min(medians) < max(50_000, 0.02 * min(medians)), medians


def test_r14_every_wrong_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is the library's own, for an unknown key too; the spy hands everything on."""
    compared: list[tuple[Any, Any]] = []
    real = hmac.compare_digest

    def spy(one: Any, other: Any) -> bool:
        compared.append((one, other))
        return bool(real(one, other))

    monkeypatch.setattr(hmac, "compare_digest", spy)
    key = fresh()
    caller = caller_of(key)
    for text in (fresh(), keys.compose(caller.key_id, "0" * 32)):
        with pytest.raises(InvalidApiKey):
            auth.authenticate(text, {caller.key_id: caller}, PEPPERS)
    assert len(compared) == 2
    assert all(len(one) == len(other) == 64 for one, other in compared)


@pytest.mark.django_db
def test_r14_an_unknown_user_costs_the_same_hash_as_a_wrong_password(
    person: Callable[..., User], settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hasher that is shipped. Its rounds are nearly all of the time, so they are counted: a clock would be noise."""
    from config import settings as shipped

    rounds: list[int] = []

    def spy(password: Any, salt: Any, iterations: int, *args: Any, **options: Any) -> bytes:
        rounds.append(iterations)
        return pbkdf2(password, salt, iterations, *args, **options)

    monkeypatch.setattr("django.contrib.auth.hashers.pbkdf2", spy)
    settings.PASSWORD_HASHERS = shipped.PASSWORD_HASHERS
    settings.AXES_ENABLED = False
    person("somebody", "operator")
    client = anybody()
    spent = []
    for name in ("somebody", "nobody-at-all"):
        rounds.clear()
        body = {"username": name, "password": "not the password"}
        assert client.post(f"{V1}/auth/token", body).status_code == 401
        spent.append(sum(rounds))
    assert spent[0] == spent[1] > 100_000


# -- to nobody else (R12, R17) -----------------------------------------------------------------------------------------

PATHS = [
    "/v1/chat/completions",
    "/v1/chat/completions/",
    "/api/v1/chat/completions",
    "/v1/models",
    "/v1/models/tiny",
    "/api/v1/models",
    "/v1/completions",
    "/v1/responses",
    "/v1/embeddings",
    "/v1/rerank",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/images/generations",
    "/v1/audio/speech",
    "/v1/moderations",
    "/v1/anything",
]
SPELLINGS = [
    "Authorization",
    "authorization",
    "x-api-key",
    "api-key",
    "x-goog-api-key",
    "Proxy-Authorization",
    "Cookie",
    "X-Custom",
    "Referer",
    "User-Agent",
    "X-Request-Id",
    "Idempotency-Key",
    "OpenAI-Organization",
    "anthropic-api-key",
]
QUERIES = ["key", "api_key", "api-key", "access_token", "token", "x-api-key"]


@pytest.mark.parametrize("path", PATHS)
def test_r17_no_way_to_send_a_key_brings_it_to_a_provider(
    pair: House, upstream: Upstream, fallback: Upstream, path: str
) -> None:
    query = "&".join(f"{name}={pair.key}" for name in QUERIES)
    for name in SPELLINGS:
        value = f"Bearer {pair.key}" if "uthorization" in name else pair.key
        headers = {"x-api-key": pair.key, name: f"a={pair.key}" if name == "Cookie" else value}
        body = {**HELLO, "user": "me", "provider_id": "first"}
        for method in ("POST", "GET"):
            httpx.request(
                method,
                f"{pair.url}{path}?{query}",
                json=body if method == "POST" else None,
                headers=headers,
            )
    for provider in (upstream, fallback):
        for record in provider.ledger.records:
            seen = f"{record.path}?{record.query} {record.header_items} {record.body!r}"
            assert pair.key not in seen
            assert pair.key[9:51] not in seen
    assert bool(upstream.ledger.asked) == ("chat/completions" in path)


@pytest.mark.parametrize("offered", [True, False])
def test_r17_a_key_of_a_websocket_reaches_no_provider(pair: House, upstream: Upstream, offered: bool) -> None:
    how: dict[str, Any] = (
        {"subprotocols": ["penstock.v1", f"penstock.key.{pair.key}"]}
        if offered
        else {"additional_headers": {"Authorization": f"Bearer {pair.key}", "Cookie": f"k={pair.key}"}}
    )
    with connect(f"{pair.url.replace('http', 'ws')}/ws/chat", **how) as socket:
        socket.send(json.dumps({"id": "r1", **HELLO}))
        while json.loads(socket.recv(timeout=5))["type"] != "done":
            pass
        assert socket.response is not None
        assert pair.key not in str(socket.response.headers)
    record = upstream.ledger.last
    assert pair.key not in f"{record.path}?{record.query} {record.header_items} {record.body!r}"


@pytest.mark.parametrize("name", QUERIES)
def test_r17_a_key_in_the_address_is_no_key(pair: House, name: str) -> None:
    for path in PATHS:
        assert httpx.post(f"{pair.url}{path}?{name}={pair.key}", json=HELLO).status_code in {401, 405}
    assert httpx.get(f"{pair.url}/v1/models?{name}={pair.key}").status_code == 401


def test_a_key_sent_as_the_request_id_is_not_kept(pair: House) -> None:
    answer = httpx.post(
        f"{pair.url}/v1/chat/completions",
        json=HELLO,
        headers={"x-api-key": pair.key, "x-request-id": pair.key},
    )
    assert answer.headers["x-request-id"] != pair.key
    assert pair.records()[0]["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    "value",
    [
        b"Bearer ' OR '1'='1",
        b"Bearer \xc3\xa9",
        b"Basic cm9vdDpyb290",
        b"",
        b"Bearer " + b"a" * 60_000,
        b"Bearer",
    ],
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/nothing"])
def test_r12_odd_bearers_are_401_at_once(house: House, value: bytes, path: str) -> None:
    with httpx.Client(base_url=house.url) as client:
        client.get(path)
        took = []
        for _ in range(5):
            began = time.monotonic()
            answer = client.get(path, headers=[(b"Authorization", value)])
            took.append(time.monotonic() - began)
            assert answer.status_code == 401
    assert statistics.median(took) < 0.05
