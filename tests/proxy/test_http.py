"""What the data plane's door lets in: keys, methods, bodies, paths, origins. Bad input of every kind gets a clear error."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from proxy import keys
from proxy.cors import ACCEPTED, MOST_ASKED, preflight
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def post(
    house: House, body: bytes | dict[str, Any], key: str | None = None, **headers: str
) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Authorization": f"Bearer {key or house.key}", "Content-Type": "application/json", **headers}
    return httpx.post(f"{house.url}/v1/chat/completions", content=content, headers=sent, timeout=30)


def code(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


@pytest.mark.parametrize("header", ["x-api-key", "api-key", "x-goog-api-key", "Authorization"])
def test_a_key_is_taken_from_any_of_its_headers(pair: House, header: str) -> None:
    value = f"Bearer {pair.key}" if header == "Authorization" else pair.key
    response = httpx.post(f"{pair.url}/v1/chat/completions", json=HELLO, headers={header: value})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/chat/completions/",
        "/api/v1/chat/completions",
        "/api/v1/chat/completions/",
    ],
)
def test_every_spelling_of_the_path_answers_without_a_redirect(pair: House, path: str) -> None:
    response = httpx.post(f"{pair.url}{path}", json=HELLO, headers={"x-api-key": pair.key})
    assert response.status_code == 200


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/nothing", "/api/v1/rerank", "/v1/messages/count_tokens", "/v1"]
)
def test_a_path_that_is_not_there_is_not_found(pair: House, path: str) -> None:
    response = httpx.post(f"{pair.url}{path}", json=HELLO, headers={"x-api-key": pair.key})
    assert code(response) == (404, "not_found")


def test_other_paths_are_the_control_planes(pair: House) -> None:
    assert httpx.get(f"{pair.url}/api/v1/providers").status_code == 299
    assert httpx.get(f"{pair.url}/admin/").status_code == 299


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "",
        "Bearer",
        "Basic {key}",
        "bearer  {key}",
        "Bearer {swapped}",
        "{key}",
        "Bearer ' OR '1'='1",
        "Bearer {cut}",
        "Bearer {stranger}",
    ],
)
def test_r12_anything_but_the_key_itself_is_401(house: House, value: str) -> None:
    key = house.key
    filled = value.format(
        key=key, swapped=key.swapcase(), cut=key[:-1], stranger=keys.compose("0" * 10, "0" * 32)
    )
    began = time.monotonic()

    response = httpx.post(f"{house.url}/v1/chat/completions", json=HELLO, headers={"Authorization": filled})

    assert code(response) == (401, "invalid_api_key")
    assert time.monotonic() - began < 1.0
    assert key not in response.text


def test_r12_two_different_keys_are_as_good_as_none(house: House) -> None:
    second = house.issue("second")
    response = post(house, HELLO, **{"x-api-key": second})
    assert code(response) == (401, "invalid_api_key")


def test_a_key_in_the_address_is_no_key(house: House) -> None:
    response = httpx.post(f"{house.url}/v1/chat/completions?key={house.key}&api_key={house.key}", json=HELLO)
    assert code(response) == (401, "invalid_api_key")


def test_an_expired_key_is_401(house: House) -> None:
    assert code(post(house, HELLO, house.issue("old", expires_at=time.time() - 1))) == (
        401,
        "invalid_api_key",
    )


def test_r10_what_is_stored_of_a_key_does_not_open_anything(house: House) -> None:
    caller = next(iter(house.watcher.snapshot.callers.values()))
    for text in (caller.digest, f"pen_live_{caller.key_id}{caller.digest[:32]}"):
        assert code(post(house, HELLO, text)) == (401, "invalid_api_key")


def test_a_key_bound_to_networks_is_403_from_elsewhere(pair: House) -> None:
    import ipaddress

    inside = pair.issue("inside", allowed_networks=(ipaddress.ip_network("127.0.0.0/8"),))
    outside = pair.issue("outside", allowed_networks=(ipaddress.ip_network("10.0.0.0/8"),))
    assert post(pair, HELLO, inside).status_code == 200
    assert code(post(pair, HELLO, outside)) == (403, "ip_not_allowed")


def test_a_key_bound_to_models_is_403_for_others_but_its_fallbacks_are_allowed(
    pair: House, upstream: Upstream
) -> None:
    from tests.support import answers

    key = pair.issue("narrow", allowed_models=("first/*",))
    assert pair.ask("first/tiny", key=key).status_code == 200
    assert code(pair.ask("second/big", key=key)) == (403, "model_not_allowed")
    assert code(pair.ask("big", key=key)) == (403, "model_not_allowed")
    upstream.behave(answers.status(500))
    assert pair.ask(None, key=key).headers["x-penstock-provider"] == "second"


def test_f22_while_the_database_is_away_known_keys_serve_and_unknown_ones_may_exist(pair: House) -> None:
    pair.watcher.told_silence = 60
    assert pair.ask(None).status_code == 200
    unknown = post(pair, HELLO, keys.compose("0" * 10, "0" * 32))
    assert unknown.status_code == 503 and unknown.headers["retry-after"]
    assert code(post(pair, HELLO, "rubbish")) == (401, "invalid_api_key")

    pair.watcher.told_silence = 301
    assert pair.ask(None).status_code == 503


# -- bodies ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe{\x00}\x00",
        b"\xef\xbb\xbf{}",
        b'{"a": 1, "a": 2}',
        b'{"temperature": NaN}',
        b'{"temperature": 1e400}',
        b'{"temperature": Infinity}',
        b'{"seed": ' + b"9" * 5000 + b"}",
        b'{"user": "\\ud800"}',
        b'{"user": "\\u0000"}',
        b'{"user": "\x00"}',
        b'{"user": "\xff"}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 10_000_000,
        b"[" + b'{"b":1},' * 1_000_000 + b"1]",
        b"{" + b",".join(b'"k%d":1' % n for n in range(700_000)) + b"}",
        b"[" + b"[]," * 3_000_000 + b"1]",
    ],
    ids=lambda body: f"{body[:16]!r}-{len(body)}",
)
def test_r35_json_that_is_not_plain_json_is_400_at_once(house: House, body: bytes) -> None:
    began = time.monotonic()
    response = post(house, body)
    assert code(response) in {(400, "invalid_json"), (400, "invalid_request")}
    # The promise is 200 ms of the server's time; sending ten megabytes over loopback on a busy machine is not in it.
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages"),
        ({"messages": [{"content": "no role"}]}, "messages"),
        ({**HELLO, "model": 7}, "model"),
        ({**HELLO, "model": "x" * 600}, "model"),
        ({**HELLO, "stream": "yes"}, "stream"),
        ({**HELLO, "stream_options": 1}, "stream_options"),
        ({**HELLO, "provider_id": ["first"]}, "provider_id"),
    ],
)
def test_a_wrong_field_is_named(pair: House, body: dict[str, Any], param: str) -> None:
    response = post(pair, body)
    assert code(response) == (400, "invalid_request")
    assert response.json()["error"]["param"] == param


def test_a_prompt_full_of_code_is_not_taken_for_structure(pair: House) -> None:
    text = '{"a": [1, 2, {"b": ","}]},' * 40_000
    assert post(pair, {"messages": [{"role": "user", "content": text}]}).status_code == 200


def test_a_prompt_that_speaks_of_escapes_is_not_taken_for_them(pair: House) -> None:
    text = "write \\u0000 and \\ud800 in Python, please: \U0001f600"
    assert post(pair, {"messages": [{"role": "user", "content": text}]}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", ""])
def test_another_media_type_is_415(house: House, kind: str) -> None:
    assert code(post(house, HELLO, **{"Content-Type": kind})) == (415, "unsupported_media_type")


def test_r29_a_compressed_request_is_415(house: House) -> None:
    assert code(post(house, HELLO, **{"Content-Encoding": "gzip"})) == (415, "unsupported_media_type")


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH"])
def test_another_method_is_405(house: House, method: str) -> None:
    response = httpx.request(method, f"{house.url}/v1/chat/completions", headers={"x-api-key": house.key})
    assert response.status_code == 405


class Wire:
    """A raw connection, to send what no client would."""

    def __init__(self, house: House) -> None:
        self._socket = socket.create_connection(("127.0.0.1", house.port), timeout=5)
        self.sent = 0

    def send(self, data: bytes) -> None:
        try:
            self._socket.sendall(data)
            self.sent += len(data)
        except (BrokenPipeError, ConnectionResetError):
            return

    def read(self) -> bytes:
        data = b""
        try:
            while part := self._socket.recv(65536):
                data += part
        except ConnectionResetError:
            pass
        self._socket.close()
        return data


def head(house: House, key: str, *more: str) -> bytes:
    lines = [
        "POST /v1/chat/completions HTTP/1.1",
        "Host: localhost",
        f"Authorization: Bearer {key}",
        "Content-Type: application/json",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def test_r34_a_body_that_says_it_is_too_large_is_413_before_it_is_read(house: House, settings: Any) -> None:
    wire = Wire(house)
    wire.send(head(house, house.key, f"Content-Length: {settings.MAX_REQUEST_BYTES + 1}"))
    answer = wire.read()
    assert answer.startswith(b"HTTP/1.1 413") and b"request_too_large" in answer


def test_r34_a_chunked_body_is_413_as_soon_as_it_is_too_large(house: House, settings: Any) -> None:
    settings.MAX_REQUEST_BYTES = 100_000
    wire = Wire(house)
    wire.send(head(house, house.key, "Transfer-Encoding: chunked"))
    for _ in range(200):
        wire.send(b"2000\r\n" + b" " * 0x2000 + b"\r\n")
    answer = wire.read()
    assert answer.startswith(b"HTTP/1.1 413")


def test_r34_without_a_key_the_body_is_never_read(house: House) -> None:
    wire = Wire(house)
    wire.send(head(house, "wrong", "Content-Length: 1000000"))
    answer = wire.read()
    assert answer.startswith(b"HTTP/1.1 401") and b"connection: close" in answer.lower()


# -- models, origins, ids ----------------------------------------------------------------------------------------------


def test_models_are_those_that_the_key_may_call(pair: House) -> None:
    everything = httpx.get(f"{pair.url}/v1/models", headers={"x-api-key": pair.key}).json()
    assert {each["id"] for each in everything["data"]} == {"tiny", "first/tiny", "big", "second/big"}

    narrow = pair.issue("narrow", allowed_models=("second/*",))
    some = httpx.get(f"{pair.url}/api/v1/models/", headers={"x-api-key": narrow}).json()
    assert {each["id"] for each in some["data"]} == {"big", "second/big"}
    assert code(httpx.get(f"{pair.url}/v1/models/first/tiny", headers={"x-api-key": narrow})) == (
        404,
        "model_not_found",
    )
    assert (
        httpx.get(f"{pair.url}/v1/models/second/big", headers={"x-api-key": narrow}).json()["id"]
        == "second/big"
    )


def test_models_need_a_key(pair: House) -> None:
    assert httpx.get(f"{pair.url}/v1/models").status_code == 401


def test_only_allowed_origins_are_told_that_they_may_read(pair: House, settings: Any) -> None:
    settings.ALLOWED_ORIGINS = ["https://app.example.com"]
    allowed = post(pair, HELLO, Origin="https://app.example.com")
    assert allowed.headers["access-control-allow-origin"] == "https://app.example.com"
    assert "x-penstock-provider" in allowed.headers["access-control-expose-headers"]
    for origin in ("https://evil.com", "null", "http://app.example.com", "https://app.example.com.evil.com"):
        assert "access-control-allow-origin" not in post(pair, HELLO, Origin=origin).headers


def test_a_preflight_is_answered_without_a_key(pair: House, settings: Any) -> None:
    settings.ALLOWED_ORIGINS = ["https://app.example.com"]
    headers = {"Origin": "https://app.example.com", "Access-Control-Request-Method": "POST"}
    response = httpx.options(f"{pair.url}/v1/chat/completions", headers=headers)
    assert response.status_code == 204
    assert "authorization" in response.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    "names",
    [
        "authorization,x-stainless-lang,x-stainless-os",
        "api-key",
        "x-goog-api-key",
        "Anthropic-Version, x-api-key",
    ],
)
def test_a_page_may_send_the_headers_that_its_sdk_sends(pair: House, settings: Any, names: str) -> None:
    settings.ALLOWED_ORIGINS = ["https://app.example.com"]
    asked = {"Origin": "https://app.example.com", "Access-Control-Request-Headers": names}

    response = httpx.options(f"{pair.url}/v1/chat/completions", headers=asked)

    allowed = response.headers["access-control-allow-headers"].split(", ")
    assert {name.strip().lower() for name in names.split(",")} < set(allowed)
    assert len(allowed) == len(set(allowed))
    assert response.headers["vary"] == "Access-Control-Request-Headers, Origin"
    stranger = httpx.options(
        f"{pair.url}/v1/chat/completions", headers={**asked, "Origin": "https://evil.com"}
    )
    assert "access-control-allow-headers" not in stranger.headers


def test_what_is_no_name_of_a_header_is_not_allowed_to_a_page(settings: Any) -> None:
    settings.ALLOWED_ORIGINS = ["https://app.example.com"]
    names = b", ".join([b"*", b"x y", b"", b"x" * 65, b"\xff", *(b"x-%d" % number for number in range(70))])
    asked = [(b"origin", b"https://app.example.com"), (b"access-control-request-headers", names)]

    allowed = dict(preflight({"headers": asked}))[b"access-control-allow-headers"].split(b", ")

    assert allowed == [*ACCEPTED, *(b"x-%d" % number for number in range(MOST_ASKED - 5))]


def test_a_well_formed_request_id_is_kept_and_another_is_replaced(pair: House) -> None:
    assert post(pair, HELLO, **{"x-request-id": "order-17.a"}).headers["x-request-id"] == "order-17.a"
    for odd in ("a b", "x" * 129, "<script>"):
        assert post(pair, HELLO, **{"x-request-id": odd}).headers["x-request-id"] != odd
    assert next(record["request_id"] for record in pair.records(4)) == "order-17.a"
