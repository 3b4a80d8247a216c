"""Chat over WebSocket, with a real client."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from tests.support import answers, faults
from tests.support.inprocess import House
from tests.support.upstream import Upstream

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


def test_a_browser_offers_its_key_as_a_subprotocol_and_it_is_never_echoed(pair: House) -> None:
    with dial(pair, key="", subprotocols=["penstock.v1", f"penstock.key.{pair.key}"]) as socket:
        assert socket.subprotocol == "penstock.v1"
        ask(socket, "r1")
        assert frames_of(socket, "r1")[-1]["type"] == "done"


@pytest.mark.parametrize(("key", "status"), [("", 401), ("pen_live_wrong", 401)])
def test_refusals_are_http_statuses_before_the_upgrade(house: House, key: str, status: int) -> None:
    with pytest.raises(InvalidStatus) as refused:
        dial(house, key=key)
    assert refused.value.response.status_code == status
    assert json.loads(refused.value.response.body or b"{}")["error"]["code"] == "invalid_api_key"


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


def test_a_broken_stream_is_an_error_frame(pair: House, upstream: Upstream) -> None:
    upstream.behave(faults.reset_after(2))
    with dial(pair) as socket:
        ask(socket, "r1")
        frames = frames_of(socket, "r1")
    assert frames[-1]["type"] == "error" and frames[-1]["error"]["code"] == "upstream_interrupted"
    assert frames[-2]["type"] == "chunk"


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
