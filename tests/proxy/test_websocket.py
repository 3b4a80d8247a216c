"""Chat over WebSocket, with a real client."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from proxy.consumers.websocket import Socket
from tests.support import answers, faults, prefill
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


def dial(house: House, *, key: str | None = None, path: str = "/ws/chat", **options: Any) -> ClientConnection:
    headers = {} if key == "" else {"Authorization": f"Bearer {key or house.key}"}
    socket: ClientConnection = connect(
        f"ws://127.0.0.1:{house.port}{path}",
        additional_headers=headers,
        compression=None,
        proxy=None,
        **options,
    )
    return socket


def frames_of(socket: ClientConnection, id: str | None) -> list[dict[str, Any]]:
    """The frames of one request, to its end."""
    found = []
    while True:
        frame = json.loads(socket.recv(timeout=10))
        if frame["id"] == id:
            found.append(frame)
            if frame["type"] in {"done", "error", "cancelled"}:
                return found


def ask(socket: ClientConnection, id: str, **body: Any) -> None:
    socket.send(json.dumps({"id": id, **HELLO, **body}))


@pytest.mark.parametrize("path", ["/ws/chat", "/v1/ws/chat", "/api/v1/ws/chat"])
def test_a_request_streams_as_frames_and_ends_with_its_usage(pair: House, path: str) -> None:
    with dial(pair, path=path) as socket:
        ask(socket, "r1")
        frames = frames_of(socket, "r1")

    text = "".join(c["delta"].get("content") or "" for f in frames[:-1] for c in f["data"]["choices"])
    assert text == "".join(answers.words(5))
    assert frames[-1] == {
        "id": "r1",
        "type": "done",
        "usage": {"prompt_tokens": 6, "completion_tokens": 5, "total_tokens": 11},
    } or (frames[-1]["type"] == "done" and frames[-1]["usage"]["completion_tokens"] == 5)
    assert pair.records()[0]["status"] == "success"


@pytest.mark.parametrize(
    "texts", [["a", "\\ud83d", "\\ude00", "b"], ["\\ud83d", "\\ude00", "b"]], ids=["within", "at first"]
)
def test_half_a_character_in_an_event_is_passed_on_as_over_http(
    pair: House, upstream: Upstream, texts: list[str]
) -> None:
    """Servers that count in UTF-16 cut an emoji into two events; whoever joins them has it whole."""
    lines = [f'{{"choices":[{{"index":0,"delta":{{"content":"{text}"}}}}]}}' for text in texts]
    lines += ['{"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}', "[DONE]"]
    body = "".join(f"data: {line}\n\n" for line in lines).encode()
    upstream.behave(answers.raw(body, headers=answers.SSE))
    with dial(pair) as socket:
        ask(socket, "r1", model="first/tiny")
        *chunks, done = frames_of(socket, "r1")
    assert done["type"] == "done"
    text = "".join(c["delta"].get("content") or "" for f in chunks for c in f["data"]["choices"])
    assert text.encode("utf-16", "surrogatepass").decode("utf-16").removeprefix("a") == "😀b"
    assert pair.ask("first/tiny", stream=True).content == body


def test_a_browser_offers_its_key_as_a_subprotocol_and_it_is_never_echoed(pair: House) -> None:
    with dial(pair, key="", subprotocols=["penstock.v1", f"penstock.key.{pair.key}"]) as socket:
        assert socket.subprotocol == "penstock.v1"
        ask(socket, "r1")
        assert frames_of(socket, "r1")[-1]["type"] == "done"


@pytest.mark.parametrize(("key", "status"), [("", 401), ("pen_live_wrong", 401)])
def test_refusals_are_http_statuses_before_the_upgrade(
    house: House, caplog: pytest.LogCaptureFixture, key: str, status: int
) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(house, key=key)
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body or b"{}")["error"]["code"] == "invalid_api_key"
    assert not caplog.records, "a refusal is no failure of the server"


def refusal(house: House, path: str, key: str | None = None) -> tuple[int, str]:
    """Status and code with which a handshake is refused."""
    with pytest.raises(InvalidStatus) as refused:
        dial(house, path=path, key=key)
    body = json.loads(refused.value.response.body or b"{}")
    return refused.value.response.status_code, body["error"]["code"]


@pytest.mark.parametrize("path", ["/v1/ws/chat/more", "/v1/chat/completions", "/api/v1/ws", "/v1"])
def test_a_path_without_a_socket_is_not_found_and_that_is_told_to_callers_with_a_key(
    house: House, path: str
) -> None:
    assert refusal(house, path) == (404, "not_found")
    assert refusal(house, path, key="") == (401, "invalid_api_key")


@pytest.mark.parametrize("path", ["/", "/admin/", "/ws", "/ws/chatter", "/livez"])
@pytest.mark.parametrize("key", [None, ""], ids=["with a key", "without"])
def test_a_path_outside_the_data_plane_has_no_socket(house: House, path: str, key: str | None) -> None:
    assert refusal(house, path, key) == (404, "not_found")


def test_r38_a_key_has_so_many_sockets_and_a_new_one_when_one_is_closed(house: House) -> None:
    caller = next(iter(house.watcher.snapshot.callers.values()))
    another = house.issue("another")
    with contextlib.ExitStack() as others:
        for _ in range(999):
            others.enter_context(house.registry.listening(caller, lambda error: None))
        with dial(house):
            with pytest.raises(InvalidStatus) as refused:
                dial(house)
            with dial(house, key=another):
                pass
        # Their end is noticed by the server a moment after the peer sees it.
        until(lambda: house.registry._sockets[caller.id] == 999)
        with dial(house):
            pass
    response = refused.value.response
    assert response.status_code == 429 and int(response.headers["Retry-After"]) >= 1
    assert json.loads(response.body or b"{}")["error"]["code"] == "concurrency_limit_exceeded"


def until(true: Callable[[], bool], seconds: float = 5) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_r38_pings_find_a_silent_peer_within_a_minute(house: House) -> None:
    config = house._server.config
    assert config.ws_ping_interval is not None and config.ws_ping_timeout is not None
    assert config.ws_ping_interval + config.ws_ping_timeout + config.limits.linger_seconds < 60


def test_r38_a_peer_that_reads_nothing_is_let_go_with_what_it_was_sent(
    pair: House, upstream: Upstream
) -> None:
    """Though a close frame cannot reach it, because everything in between is full."""
    config = pair._server.config
    config.ws_ping_interval, config.ws_ping_timeout = 0.3, 0.3
    config.limits = replace(config.limits, linger_seconds=0.2)
    upstream.behave(answers.ok(texts=["x" * 16_000] * 2000))
    with deaf(pair):
        upstream.ledger.wait_for(lambda ledger: ledger.asked and ledger.last.closed_by_peer_at, timeout=5)
    assert pair.records()[0]["status"] == "client_disconnected"


@contextlib.contextmanager
def deaf(house: House) -> Iterator[None]:
    """A socket that has asked for an answer and reads none of it."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    wire.connect(("127.0.0.1", house.port))
    frame = json.dumps({"id": "r1", **HELLO}).encode()
    with wire:
        wire.sendall(
            f"GET /ws/chat HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nx-api-key: {house.key}\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n".encode()
        )
        assert b" 101 " in wire.recv(200)
        wire.sendall(bytes([0x81, 0x80 | len(frame), 0, 0, 0, 0]) + frame)
        yield


def test_a_key_in_the_address_is_refused(house: House) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(house, path=f"/ws/chat?key={house.key}")
    assert refused.value.response.status_code == 400


def test_many_requests_share_a_socket(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=5, delay=0.02))
    with dial(pair) as socket:
        for number in range(10):
            ask(socket, f"r{number}")
        ended: set[str] = set()
        while len(ended) < 10:
            frame = json.loads(socket.recv(timeout=10))
            assert frame["type"] in {"chunk", "done"}
            if frame["type"] == "done":
                ended.add(frame["id"])
    assert len(pair.records(10)) == 10


def test_cancel_stops_one_request_and_tells_what_it_used(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=500, delay=0.02))
    with dial(pair) as socket:
        ask(socket, "r1")
        socket.recv(timeout=5)
        socket.send(json.dumps({"id": "r1", "type": "cancel"}))
        last = frames_of(socket, "r1")[-1]
        upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at, timeout=1)
        ask(socket, "r2", model="second/big")
        assert frames_of(socket, "r2")[-1]["type"] == "done"

    assert last["type"] == "cancelled" and last["usage"]["prompt_tokens"] > 0
    assert {record["status"] for record in pair.records(2)} == {"client_disconnected", "success"}


def test_leaving_stops_every_request_of_the_socket(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=500, delay=0.02))
    with dial(pair) as socket:
        ask(socket, "r1")
        ask(socket, "r2")
        socket.recv(timeout=5)
    upstream.ledger.wait_for(lambda ledger: all(r.closed_by_peer_at for r in ledger.asked), timeout=2)
    assert {record["status"] for record in pair.records(2)} == {"client_disconnected"}


async def test_a_peer_that_leaves_under_a_frame_is_no_failure_of_the_request() -> None:
    sent = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message["type"])
        raise OSError("as servers say that nobody is there")

    socket = Socket(send)
    await socket.frame(id="r1", type="chunk")
    await socket.frame(id="r1", type="chunk")
    await socket.close(1012)
    assert sent == ["websocket.send"]


def test_a_broken_stream_is_an_error_frame(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.reset_after(2))
    with dial(pair) as socket:
        ask(socket, "r1")
        frames = frames_of(socket, "r1")
    assert frames[-1]["type"] == "error" and frames[-1]["error"]["code"] == "upstream_interrupted"
    assert frames[-2]["type"] == "chunk"


@pytest.mark.parametrize("asked", [True, False], ids=["asked for", "not asked for"])
def test_the_chunk_with_the_usage_comes_only_when_asked_for_and_done_has_it_always(
    pair: House, upstream: Upstream, asked: bool
) -> None:
    with dial(pair) as socket:
        ask(socket, "r1", **({"stream_options": {"include_usage": True}} if asked else {}))
        frames = frames_of(socket, "r1")
    told = [f["data"]["usage"] for f in frames[:-1] if f["data"]["choices"] == []]
    counted = upstream_usage(upstream)
    assert told == ([counted] if asked else [])
    assert frames[-1]["usage"] == counted


def upstream_usage(upstream: Upstream, **answer: Any) -> dict[str, int]:
    """What the first upstream counts for its first request."""
    return answers.Answer(**answer).tokens(upstream.ledger.asked[0])


def test_stream_options_that_are_none_are_an_error(pair: House) -> None:
    with dial(pair) as socket:
        ask(socket, "r1", stream_options="usage")
        (error,) = frames_of(socket, "r1")
    assert error["error"]["param"] == "stream_options"


def test_without_usage_from_the_provider_each_chunk_counts(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(usage=False))
    with dial(pair) as socket:
        ask(socket, "r1")
        frames = frames_of(socket, "r1")
    record = pair.records()[0]
    assert record["tokens_source"] == "estimated"
    assert frames[-1]["usage"]["completion_tokens"] == record["completion_tokens"] > 0
    assert frames[-1]["usage"]["prompt_tokens"] == record["prompt_tokens"] > 0


def test_after_a_resumed_stream_done_has_the_usage_of_all_of_it(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.continuing())
    with dial(pair) as socket:
        ask(socket, "r1", temperature=0)
        frames = frames_of(socket, "r1")

    text = "".join(c["delta"].get("content") or "" for f in frames[:-1] for c in f["data"]["choices"])
    assert text == prefill.LONG.text
    assert frames[-1]["type"] == "done"
    assert frames[-1]["usage"] == upstream_usage(upstream, texts=prefill.LONG.texts)
    assert [record["completion_tokens"] for record in pair.records(2)] == [40, 60]


def test_a_resumed_stream_that_is_cancelled_has_the_tokens_of_all_of_it(
    pair: House, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(faults.reset_after(40))
    fallback.behave(answers.ok(texts=prefill.LONG.texts, delay=0.01))
    chunks = 0
    with dial(pair) as socket:
        ask(socket, "r1", temperature=0)
        while chunks < 45:
            frame = json.loads(socket.recv(timeout=5))
            chunks += bool(frame["data"]["choices"][0]["delta"].get("content"))
        socket.send(json.dumps({"id": "r1", "type": "cancel"}))
        rest = frames_of(socket, "r1")
    assert rest[-1]["type"] == "cancelled"
    assert rest[-1]["usage"]["completion_tokens"] == chunks + len(rest) - 1
    assert rest[-1]["usage"]["prompt_tokens"] > 0


@pytest.mark.parametrize(
    ("frame", "code"),
    [
        ("{", "invalid_json"),
        ("[]", "invalid_json"),
        ('{"a": 1, "a": 2}', "invalid_json"),
        ("{}", "invalid_request"),
        ('{"id": 7}', "invalid_request"),
        ('{"id": ""}', "invalid_request"),
    ],
)
def test_a_bad_frame_is_an_error_without_id_and_the_socket_lives(pair: House, frame: str, code: str) -> None:
    with dial(pair) as socket:
        socket.send(frame)
        error = json.loads(socket.recv(timeout=5))
        assert (error["id"], error["type"], error["error"]["code"]) == (None, "error", code)
        ask(socket, "r1")
        assert frames_of(socket, "r1")[-1]["type"] == "done"


def test_a_bad_request_is_an_error_with_its_id(pair: House) -> None:
    with dial(pair) as socket:
        socket.send(json.dumps({"id": "r1", "messages": []}))
        error = json.loads(socket.recv(timeout=5))
        assert (error["id"], error["error"]["code"], error["error"]["param"]) == (
            "r1",
            "invalid_request",
            "messages",
        )


def test_r38_a_frame_above_one_mebibyte_closes_1009(pair: House) -> None:
    with dial(pair) as socket:
        socket.send(json.dumps({"id": "r1", "messages": [{"role": "user", "content": "x" * 1_100_000}]}))
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_r15_a_revoked_key_gets_an_error_frame_and_close_4401(pair: House) -> None:
    with dial(pair) as socket:
        ask(socket, "r1")
        frames_of(socket, "r1")
        pair.revoke(pair.key)
        error = json.loads(socket.recv(timeout=5))
        assert error["error"]["code"] == "key_revoked"
        with pytest.raises(ConnectionClosed) as closed:
            socket.recv(timeout=5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 4401
