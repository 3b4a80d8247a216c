"""What callers get when providers behave, and when they do not. Faults by their numbers in docs/threat-model.md."""

from __future__ import annotations

import http.client
import json
import socket
import time
from typing import Any

import httpx
import pytest
from channels.testing import HttpCommunicator

from providers.sse import MAX_EVENT_BYTES
from proxy.spool import Spool
from tests.support import answers, faults
from tests.support.http_server import Exchange
from tests.support.inprocess import House
from tests.support.ports import free_port
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database


def events(response: httpx.Response) -> list[Any]:
    """The data of each event; `[DONE]` as that text."""
    found = [line.removeprefix("data: ") for line in response.text.split("\n") if line.startswith("data: ")]
    return [data if data == "[DONE]" else json.loads(data) for data in found]


def text_of(response: httpx.Response) -> str:
    return "".join(
        choice["delta"].get("content") or ""
        for event in events(response)
        if isinstance(event, dict)
        for choice in event.get("choices", ())
    )


def test_a_stream_arrives_byte_for_byte_and_ends_with_done(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=7))

    response = pair.ask(stream=True)

    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert text_of(response) == "".join(answers.words(7))
    assert events(response)[-1] == "[DONE]"
    record = pair.records()[0]
    assert record["status"] == "success"
    assert (record["prompt_tokens"], record["completion_tokens"], record["tokens_source"]) == (
        7,
        7,
        "provider",
    )


def test_a_plain_answer_is_passed_on_as_it_is(pair: House, upstream: Upstream) -> None:
    response = pair.ask()

    assert response.status_code == 200
    assert response.json()["choices"][0]["message"]["content"] == "".join(answers.words(5))
    assert response.headers["x-penstock-provider"] == "first"
    assert response.headers["x-penstock-model"] == "tiny"
    assert response.headers["x-penstock-attempts"] == "1"
    assert int(response.headers["x-penstock-config"]) > 0
    assert pair.records()[0]["bytes_out"] == len(response.content)


def test_usage_is_always_asked_for_and_only_passed_on_to_who_asked(pair: House, upstream: Upstream) -> None:
    silent = pair.ask(stream=True)
    told = pair.ask(stream=True, stream_options={"include_usage": True})

    assert all(record.json["stream_options"]["include_usage"] for record in upstream.ledger.asked)
    assert not any(event.get("usage") for event in events(silent)[:-1])
    assert events(told)[-2]["usage"]["completion_tokens"] == 5
    assert events(told)[-2]["choices"] == []
    assert [record["completion_tokens"] for record in pair.records(2)] == [5, 5]


def test_our_own_fields_and_the_callers_key_never_reach_the_provider(pair: House, upstream: Upstream) -> None:
    """R17, in every place that a key can be put."""
    headers = {
        name: f"Bearer {pair.key}" if name == "Authorization" else pair.key
        for name in ("Authorization", "x-api-key", "api-key", "x-goog-api-key")
    }
    more = {"Cookie": f"key={pair.key}", "Proxy-Authorization": f"Bearer {pair.key}", "X-Custom": "kept here"}
    response = httpx.post(
        f"{pair.url}/v1/chat/completions?key={pair.key}",
        json={"provider_id": "first", "model": "tiny", "messages": [{"role": "user", "content": "hi"}]},
        headers={**headers, **more},
    )

    assert response.status_code == 200
    record = upstream.ledger.last
    seen = f"{record.path}?{record.query} {record.header_items} {record.body!r}"
    assert pair.key not in seen
    assert "provider_id" not in record.json
    assert record.headers["authorization"] == "Bearer sk-upstream-0123456789"
    assert "x-custom" not in record.headers and "cookie" not in record.headers


def test_r28_only_our_own_headers_reach_the_caller(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.leaky())

    response = pair.ask(stream=True)

    assert text_of(response)
    leaked = {name.lower() for name in answers.LEAKY_HEADERS} - {"x-request-id"}
    assert not leaked & set(response.headers)
    assert response.headers["x-request-id"] != answers.LEAKY_HEADERS["X-Request-Id"]


def test_r55_no_answer_may_be_cached(pair: House) -> None:
    assert pair.ask().headers["cache-control"] == "no-store"
    assert pair.ask(stream=True).headers["cache-control"] == "no-store"
    assert pair.ask(key="wrong").headers["cache-control"] == "no-store"


# -- before the first byte: another candidate --------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    "fault",
    [
        answers.status(500),
        answers.status(503),
        answers.status(529),
        answers.status(429),
        answers.status(404),
        answers.unauthorized(),
        faults.reset_before_headers(),
        faults.hang_up_before_headers(),
        faults.silence(),
        faults.html(),
        faults.not_http(),
        faults.empty(),
        faults.huge_headers(),
        faults.redirect(307, "http://127.0.0.1:9/"),
        faults.gzip_bomb(1),
    ],
    ids=lambda fault: getattr(fault, "__qualname__", "fault").split(".")[0],
)
def test_what_goes_wrong_before_the_first_byte_is_taken_over(
    pair: House, upstream: Upstream, fallback: Upstream, fault: Any, stream: bool
) -> None:
    upstream.behave(fault)

    response = pair.ask(None, stream=stream) if stream else _plain_with_short_patience(pair)

    assert response.status_code == 200, response.text
    assert response.headers["x-penstock-provider"] == "second"
    assert response.headers["x-penstock-model"] == "big"
    assert response.headers["x-penstock-attempts"] == "2"
    first, second = pair.records(2)
    assert first["status"] != "success" and first["completion_tokens"] == 0
    assert second["status"] == "success" and second["attempt"] == 2
    assert first["request_id"] == second["request_id"]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ending", ["breaks off", "stalls"])
@pytest.mark.parametrize("key", ["sk-secret-0123456789", ""], ids=["with a key", "without"])
def test_f12_an_error_means_the_same_though_its_body_breaks_off_or_stalls(
    house: House, upstream: Upstream, fallback: Upstream, key: str, ending: str, stream: bool
) -> None:
    body = json.dumps(answers.error_body("maximum context length", "context_length_exceeded")).encode()

    async def behave(exchange: Exchange) -> None:
        await exchange.head(400, answers.JSON)
        await exchange.body(body)
        await (exchange.hang_up() if ending == "breaks off" else exchange.silence())

    upstream.behave(behave)
    first = house.provide("first", f"{upstream.url}/v1", key=key)
    second = house.provide("second", f"{fallback.url}/v1", models=("big",))
    house.activate((first, "tiny"), (second, "big"))
    began = time.monotonic()

    response = house.ask(None, stream=stream)

    assert (response.status_code, response.headers.get("x-penstock-provider")) == (200, "second")
    assert time.monotonic() - began < 4


def _plain_with_short_patience(pair: House) -> httpx.Response:
    """A plain request waits for the whole answer, so it is given less time than usual."""
    pair.shorten(request=1.0)
    return pair.ask(None)


@pytest.mark.parametrize(
    "fault",
    [faults.headers_then_silence(), faults.late_first_token(20), faults.done_first(), faults.error_in_200()],
)
def test_f05_and_f02_a_stream_that_never_begins_is_taken_over(
    pair: House, upstream: Upstream, fault: Any
) -> None:
    upstream.behave(fault)
    began = time.monotonic()

    response = pair.ask(None, stream=True)

    assert text_of(response) == "".join(answers.words(5))
    assert response.headers["x-penstock-provider"] == "second"
    assert time.monotonic() - began < 3


def test_f01_a_refused_connection_costs_almost_no_time(house: House, fallback: Upstream) -> None:
    dead = house.provide("dead", f"http://127.0.0.1:{free_port()}/v1")
    second = house.provide("second", f"{fallback.url}/v1")
    house.activate((dead, "tiny"), (second, "tiny"))
    began = time.monotonic()

    response = house.ask(None)

    assert response.headers["x-penstock-provider"] == "second"
    assert time.monotonic() - began < 1.0


def test_f01_after_five_failures_in_a_row_the_provider_is_left_alone(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.status(500))
    for _ in range(5):
        assert pair.ask(None).headers["x-penstock-attempts"] == "2"
    upstream.ledger.clear()

    response = pair.ask(None)

    assert response.headers["x-penstock-attempts"] == "1"
    assert not upstream.ledger.asked
    assert pair.watcher._suspects == {1}


def test_at_most_three_providers_are_dialled(house: House) -> None:
    with Upstream(answers.status(503)) as broken:
        for number in range(4):
            house.provide(f"p{number}", f"{broken.url}/v1")
        house.activate(*((number, "tiny") for number in range(1, 5)))

        response = house.ask(None)

        assert response.status_code == 502
        assert response.json()["error"]["code"] == "upstream_error"
        assert len(broken.ledger.asked) == 3


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (answers.content_policy(), 400, "content_policy_violation"),
        (answers.status(422), 400, "invalid_request"),
    ],
)
def test_the_callers_own_mistake_is_passed_on_and_not_tried_elsewhere(
    pair: House, fallback: Upstream, upstream: Upstream, fault: Any, status: int, code: str
) -> None:
    upstream.behave(fault)

    response = pair.ask(None, stream=True)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert not fallback.ledger.asked


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (answers.status(429, retry_after="7"), 429, "rate_limit_exceeded"),
        (answers.status(404), 404, "model_not_found"),
        (answers.unauthorized(), 503, "credential_unavailable"),
        (answers.status(500), 502, "upstream_error"),
        (faults.silence(), 504, "upstream_timeout"),
        (faults.empty(), 502, "empty_response"),
        (faults.html(), 502, "upstream_protocol_error"),
        (faults.redirect(302, "http://127.0.0.1:9/?secret=1"), 502, "upstream_redirect"),
    ],
)
def test_what_every_candidate_said_is_what_the_caller_hears(
    house: House, upstream: Upstream, fault: Any, status: int, code: str
) -> None:
    upstream.behave(fault)
    house.provide("only", f"{upstream.url}/v1")

    response = house.ask("only/tiny", stream=True)

    assert (response.status_code, response.json()["error"]["code"]) == (status, code)
    assert "secret" not in response.text
    if status in {429, 503}:
        assert int(response.headers["retry-after"]) >= 1
    if status == 429:
        assert response.headers["retry-after"] == "7"


def test_a_refused_key_is_marked_and_the_provider_is_not_blamed(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.unauthorized())

    pair.ask(None)

    assert pair.watcher._rejected == {1}
    assert not pair.watcher._suspects


# -- after the first byte: the truth -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", range(1, 6))
@pytest.mark.parametrize(
    "fault", [faults.reset_after, faults.unterminated_after, faults.closed_after, faults.ended_after]
)
def test_f04_a_stream_that_breaks_ends_with_exactly_one_error(
    pair: House, upstream: Upstream, fallback: Upstream, fault: Any, k: int
) -> None:
    upstream.behave(fault(k))

    response = pair.ask(None, stream=True)

    told = events(response)
    assert text_of(response) == "".join(answers.words(k))
    assert told[-1]["error"]["code"] == "upstream_interrupted"
    assert told[-1]["request_id"] == response.headers["x-request-id"]
    assert sum("error" in event for event in told) == 1
    assert "[DONE]" not in told
    assert not any(choice.get("finish_reason") for event in told for choice in event.get("choices", ()))
    assert not fallback.ledger.asked
    record = pair.records()[0]
    assert (record["status"], record["completion_tokens"], record["tokens_source"]) == (
        "upstream_interrupted",
        k,
        "estimated",
    )


def test_f04_a_whole_answer_that_breaks_off_is_an_error_of_the_provider(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    for each in (upstream, fallback):
        each.behave(faults.cut_json())
    response = pair.ask(None)
    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_error"
    assert {record["status"] for record in pair.records()} == {"upstream_interrupted"}


def test_f04_the_connection_closes_after_a_broken_stream(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.reset_after(2))
    connection = http.client.HTTPConnection("127.0.0.1", pair.port, timeout=5)
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True})
    headers = {"Authorization": f"Bearer {pair.key}", "Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    socket = connection.sock

    assert b"upstream_interrupted" in connection.getresponse().read()

    assert socket.recv(1) == b""
    socket.close()


def test_f03_silence_in_a_stream_is_noticed_within_the_idle_limit(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.stall_after(3))
    began = time.monotonic()

    response = pair.ask(None, stream=True)

    assert events(response)[-1]["error"]["code"] == "upstream_stalled"
    assert 0.9 < time.monotonic() - began < 2.0
    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)
    assert pair.records()[0]["status"] == "upstream_stalled"


@pytest.mark.parametrize("fault", [faults.garbage_event(3), faults.binary_event(3), faults.error_in_200(3)])
def test_f06_garbage_in_a_stream_ends_it_with_an_error(pair: House, upstream: Upstream, fault: Any) -> None:
    upstream.behave(fault)

    told = events(pair.ask(None, stream=True))

    assert told[-1]["error"]["code"] == "upstream_interrupted"
    assert "[DONE]" not in told


def test_f06_characters_cut_anywhere_arrive_whole(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.every_byte())

    response = pair.ask(None, stream=True)

    assert events(response)[-1] == "[DONE]"
    response.content.decode("utf-8")
    assert pair.records()[0]["status"] == "success"


def test_r30_an_endless_line_ends_with_an_error_and_little_memory(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.huge_line())

    response = pair.ask("first/tiny", stream=True)

    assert response.status_code == 502
    assert response.json()["error"]["code"] == "upstream_protocol_error"
    assert upstream.ledger.last.bytes_sent < 64 * 1024 * 1024


EMPTY = b'data: {"choices":[{"index":0,"delta":{"role":"assistant"}}],"junk":"%b"}\n\n' % (b"x" * 60_000)
HELLO = b'data: {"choices":[{"index":0,"delta":{"content":"hello"}}]}\n\n'
FINISHED = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


@pytest.mark.parametrize(
    ("begin", "endless", "status"),
    [(b"", EMPTY, 502), (HELLO + FINISHED, EMPTY, 200), (HELLO + FINISHED, b"x" * 65536, 200)],
    ids=["before the answer", "after it", "a line after it"],
)
def test_r30_what_surrounds_an_answer_is_not_kept_without_end(
    house: House, upstream: Upstream, begin: bytes, endless: bytes, status: int
) -> None:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, answers.SSE)
        await exchange.body(begin)
        while True:
            await exchange.body(endless)

    upstream.behave(behave)
    house.provide("only", f"{upstream.url}/v1")

    response = house.ask(stream=True)

    assert response.status_code == status
    assert len(response.content) < 2 * MAX_EVENT_BYTES
    if status == 200:
        assert text_of(response) == "hello" and events(response)[-1] == "[DONE]"
    else:
        assert response.json()["error"]["code"] == "upstream_protocol_error"
        assert upstream.ledger.last.bytes_sent < 64 * 1024 * 1024


def test_r30_an_endless_body_is_refused(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.huge_json())

    response = pair.ask("first/tiny")

    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_protocol_error")


@pytest.mark.parametrize(
    "fault",
    [faults.no_done(), faults.finished_then(), answers.ok(done=False)],
    ids=["no done", "reset", "plain end"],
)
def test_a_stream_with_a_finish_reason_is_complete_whatever_follows(
    pair: House, upstream: Upstream, fault: Any
) -> None:
    upstream.behave(fault)
    began = time.monotonic()

    response = pair.ask(None, stream=True)

    told = events(response)
    assert told[-1] == "[DONE]"
    assert any(c.get("finish_reason") == "stop" for e in told[:-1] for c in e["choices"])
    assert time.monotonic() - began < 1.5


def test_an_unknown_finish_reason_is_passed_on_as_it_is(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(finish="cosmic_ray"))

    told = events(pair.ask(None, stream=True))

    assert [c["finish_reason"] for e in told[:-1] for c in e["choices"] if c.get("finish_reason")] == [
        "cosmic_ray"
    ]


def test_tool_calls_are_content(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(tool=("look_up", ['{"x"', ": 1}"]), finish="tool_calls"))

    told = events(pair.ask(None, stream=True))

    pieces = [
        call["function"].get("arguments", "")
        for event in told[:-1]
        for choice in event["choices"]
        for call in choice["delta"].get("tool_calls", ())
    ]
    assert json.loads("".join(pieces)) == {"x": 1}


# -- the caller leaves -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 1, 3])
def test_f15_the_provider_is_stopped_within_a_second_of_the_callers_leaving(
    pair: House, upstream: Upstream, k: int
) -> None:
    upstream.behave(answers.ok(chunks=200, delay=0.05, first_after=0.3))
    with (
        httpx.Client() as client,
        client.stream(
            "POST",
            f"{pair.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": "hello"}], "stream": True},
            headers={"Authorization": f"Bearer {pair.key}"},
        ) as response,
    ):
        lines = (line for line in response.iter_lines() if line)
        for _ in range(k):
            next(lines)
    left = time.monotonic()

    upstream.ledger.wait_for(lambda ledger: ledger.asked and ledger.asked[-1].closed_by_peer_at)

    assert time.monotonic() - left < 1
    record = pair.records()[0]
    assert record["status"] == "client_disconnected" and record["client_disconnected"]
    assert record["tokens_source"] == "estimated" and record["prompt_tokens"] > 0


@pytest.mark.parametrize("prompt", ["hello", "a long river " * 20_000], ids=["short", "longer than a buffer"])
def test_f14_leaving_before_the_first_byte_stops_the_provider_too(
    pair: House, upstream: Upstream, prompt: str
) -> None:
    upstream.behave(faults.silence())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{pair.url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": prompt}]},
            headers={"Authorization": f"Bearer {pair.key}"},
            timeout=0.3,
        )

    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at, timeout=1)

    record = pair.records()[0]
    assert (record["status"], record["tokens_source"], record["prompt_tokens"]) == (
        "client_disconnected",
        "none",
        0,
    )


def test_a_revoked_key_ends_its_running_stream_with_an_error(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=200, delay=0.05))
    with httpx.stream(
        "POST",
        f"{pair.url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": "hello"}], "stream": True},
        headers={"Authorization": f"Bearer {pair.key}"},
    ) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        pair.revoke(pair.key)
        revoked = time.monotonic()
        last = list(lines)[-1]

    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "key_revoked"
    assert time.monotonic() - revoked < 2
    assert pair.ask(None).status_code == 401
    assert pair.records()[0]["status"] == "interrupted"


def test_a_full_usage_log_refuses_before_anything_is_dialled(pair: House, upstream: Upstream) -> None:
    pair.spool_dir.mkdir(exist_ok=True)
    pair.gateway.spool = Spool(pair.spool_dir / "full", max_bytes=0)
    pair.gateway.spool.run()

    response = pair.ask(None)

    assert (response.status_code, response.json()["error"]["code"]) == (503, "usage_log_unavailable")
    assert not upstream.ledger.asked


def test_the_connection_of_a_stream_that_broke_ends_without_a_reset(pair: House, upstream: Upstream) -> None:
    """The head did not say that it would end, so a client may send its next request before it has noticed."""
    upstream.behave(faults.reset_after(2))
    body = b'{"messages": [{"role": "user", "content": "hello"}], "stream": true}'
    request = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nx-api-key: {pair.key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", pair.port), timeout=5) as wire:
        wire.sendall(request + body)
        answer = b""
        while part := wire.recv(65_536):
            answer += part
        assert b"upstream_interrupted" in answer and answer.endswith(b"\r\n0\r\n\r\n")
        # A connection that was reset refuses what is sent after the first part.
        wire.sendall(request)
        wire.sendall(body)
        assert wire.recv(65_536) == b""
    assert len(pair.records()) == 1


def test_behind_another_server_too_a_caller_who_leaves_stops_the_upstream(
    pair: House, upstream: Upstream
) -> None:
    """One that knows nothing of the function in the request's state: daphne, in development."""
    upstream.behave(answers.ok(chunks=500, delay=0.02))
    body = json.dumps({"messages": [{"role": "user", "content": "hello"}], "stream": True}).encode()
    headers = [(b"x-api-key", pair.key.encode()), (b"content-type", b"application/json")]

    async def leave() -> None:
        caller = HttpCommunicator(pair._application(), "POST", "/v1/chat/completions", body, headers)
        await caller.send_input({"type": "http.request", "body": body})
        assert (await caller.receive_output())["status"] == 200
        assert b"data: " in (await caller.receive_output())["body"]
        await caller.send_input({"type": "http.disconnect"})
        await caller.wait()

    pair._thread.run(leave())

    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at, timeout=2)
    record = pair.records()[0]
    assert record["status"] == "client_disconnected" and record["client_disconnected"] is True
