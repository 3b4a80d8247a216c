"""The test support does what it says: a fault that does not happen would let every test of it pass."""

from __future__ import annotations

import gzip
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psycopg
import pytest
import redis

from tests.support import answers, faults, ports
from tests.support.answers import ok, status
from tests.support.gateway import Gateway
from tests.support.http_server import Behaviour, Exchange
from tests.support.llama import Llama, must_call_a_tool
from tests.support.postgres import Postgres
from tests.support.processes import Process, StartFailed, descendants, runs
from tests.support.upstream import Trap, Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
        },
    },
}


@pytest.fixture
def upstream() -> Iterator[Upstream]:
    with Upstream() as server:
        yield server


def ask(
    server: Upstream, *, path: str = "/v1/chat/completions", stream: bool = True, **body: Any
) -> socket.socket:
    """Send a request on a raw socket, so that the tests see the very bytes and how the connection ends."""
    content = json.dumps(
        {"model": "tiny", "stream": stream, "messages": [{"role": "user", "content": "hi"}], **body}
    )
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sk-test\r\nContent-Length: {len(content)}\r\n\r\n"
    connection = socket.create_connection((ports.LOOPBACK, server.port), timeout=5)
    connection.sendall(head.encode() + content.encode())
    return connection


def everything(connection: socket.socket, *, until_closed: bool = False) -> tuple[bytes, str]:
    """All bytes, and how it ended: `end` (the answer is complete, or FIN), `reset`, or `silent` for half a second."""
    received = bytearray()
    connection.settimeout(0.5)
    with connection:
        try:
            while piece := connection.recv(1 << 20):
                received += piece
                if _complete(received) and not until_closed:
                    break
        except ConnectionResetError:
            return bytes(received), "reset"
        except TimeoutError:
            return bytes(received), "silent"
    return bytes(received), "end"


def _complete(received: bytearray) -> bool:
    head, _, body = bytes(received).rpartition(b"HTTP/1.1 ")[2].partition(b"\r\n\r\n")
    length = re.search(rb"Content-Length: (\d+)", head)
    return len(body) == int(length[1]) if length else received.endswith(b"\r\n0\r\n\r\n")


def answer_to(upstream: Upstream, behaviour: Behaviour, **body: Any) -> tuple[bytes, str]:
    upstream.behave(behaviour)
    return everything(ask(upstream, **body))


# -- the upstream, well behaved ----------------------------------------------------------------------------------------


def test_a_good_stream_has_role_content_finish_usage_and_done(upstream: Upstream) -> None:
    upstream.behave(ok(chunks=3))
    body = {"stream": True, "stream_options": {"include_usage": True}, "model": "m", "messages": []}
    response = httpx.post(f"{upstream.url}/v1/chat/completions", json=body)
    *events, done = [line.removeprefix("data: ") for line in response.text.split("\n") if line]
    parsed = [json.loads(event) for event in events]
    assert [event["choices"][0]["delta"].get("content") for event in parsed[:-1]] == [
        "",
        "word1 ",
        "word2 ",
        "word3 ",
        None,
    ]
    assert parsed[0]["choices"][0]["delta"]["role"] == "assistant"
    assert parsed[-2]["choices"][0]["finish_reason"] == "stop"
    assert parsed[-1]["choices"] == []
    assert parsed[-1]["usage"]["completion_tokens"] == 3
    assert done == "[DONE]"
    assert upstream.ledger.last.chunks_sent == 3


def test_the_official_client_reads_text_tools_reasoning_embeddings_and_models(upstream: Upstream) -> None:
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{upstream.url}/v1", api_key="k", max_retries=0) as client:
        chat: Any = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
        assert client.chat.completions.create(**chat).choices[0].message.content == answers.Answer().text
        upstream.script(ok(tool=("f", ['{"a"', ":1}"]), finish="tool_calls"))
        call = client.chat.completions.create(**chat).choices[0].message.tool_calls[0]
        assert (call.function.name, json.loads(call.function.arguments)) == ("f", {"a": 1})
        upstream.script(ok(tool=("f", ['{"a"', ":1}"]), finish="tool_calls"))
        deltas = [chunk.choices[0].delta for chunk in client.chat.completions.create(**chat, stream=True)]
        pieces = [delta.tool_calls[0].function.arguments for delta in deltas if delta.tool_calls]
        assert "".join(pieces) == '{"a":1}'
        assert len(client.embeddings.create(model="tiny", input=["a", "b"]).data) == 2
        assert [model.id for model in client.models.list()] == ["tiny", "big"]


def test_the_script_is_used_up_by_requests_and_not_by_probes(upstream: Upstream) -> None:
    upstream.script(status(503), status(429, retry_after=2))
    url = f"{upstream.url}/v1/chat/completions"
    assert httpx.get(f"{upstream.url}/v1/models").status_code == 200
    assert httpx.post(url, json={}).status_code == 503
    limited = httpx.post(url, json={})
    assert (limited.status_code, limited.headers["retry-after"]) == (429, "2")
    assert httpx.post(url, json={}).status_code == 200
    assert [record.status for record in upstream.ledger.asked] == [503, 429, 200]
    assert upstream.ledger.connections == 4


def test_the_ledger_says_when_the_caller_left(upstream: Upstream) -> None:
    upstream.behave(ok(chunks=1000, delay=0.01))
    connection = ask(upstream)
    upstream.ledger.wait_for(lambda ledger: ledger.records and ledger.last.chunks_sent >= 3)
    before = upstream.ledger.last
    assert not before.done
    left = time.monotonic()
    connection.close()
    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)
    noticed = upstream.ledger.last.closed_by_peer_at
    assert noticed is not None
    assert 0 <= noticed - left < 0.5
    assert upstream.ledger.last.chunks_sent < 100


def test_the_ledger_keeps_connections_apart_and_bodies_whole(upstream: Upstream) -> None:
    with httpx.Client(base_url=upstream.url) as client:
        client.post("/v1/chat/completions", json={"model": "a"}, headers={"X-Test": "1"})
        client.post("/v1/chat/completions", content=iter([b'{"model":', b'"b"}']))
    first, second = upstream.ledger.records
    assert (first.model, second.model) == ("a", "b")
    assert (first.connection, second.connection) == (1, 1)
    assert first.headers["x-test"] == "1"
    assert first.bytes_sent > 100


async def test_waiting_for_the_ledger_leaves_an_async_test_running(upstream: Upstream) -> None:
    async with httpx.AsyncClient() as client:
        await client.post(f"{upstream.url}/v1/chat/completions", json={})
    await upstream.ledger.until(lambda ledger: ledger.last.done)
    with pytest.raises(AssertionError, match="not within"):
        await upstream.ledger.until(lambda ledger: len(ledger) > 1, timeout=0.05)


def test_a_mistake_in_a_behaviour_fails_the_test() -> None:
    async def mistaken(exchange: Exchange) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Upstream(mistaken) as server:
        everything(ask(server))


def test_an_upstream_refuses_and_listens_again_on_its_port(upstream: Upstream) -> None:
    connection = ask(upstream, model="do-hang")
    upstream.ledger.wait_for(lambda ledger: len(ledger) == 1)
    upstream.refuse()
    assert everything(connection) == (b"", "reset")
    assert not ports.accepts(upstream.port)
    upstream.listen()
    assert ports.accepts(upstream.port)


# -- the upstream's faults ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [0, 3])
@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (faults.reset_after, "reset"),
        (faults.unterminated_after, "end"),
        (faults.closed_after, "end"),
        (faults.ended_after, "end"),
        (faults.stall_after, "silent"),
    ],
)
def test_a_stream_breaks_after_exactly_k_chunks(upstream: Upstream, fault: Any, how: str, k: int) -> None:
    received, ended = answer_to(upstream, fault(k))
    assert (received.count(b"word"), ended) == (k, how)
    assert upstream.ledger.last.chunks_sent == k
    assert b"[DONE]" not in received
    assert b'"finish_reason":"' not in received
    assert received.endswith(b"0\r\n\r\n") == (fault is faults.ended_after)
    assert (b"Transfer-Encoding" in received) != (fault is faults.closed_after)


@pytest.mark.parametrize(
    ("fault", "how"),
    [
        (faults.reset_before_headers(), "reset"),
        (faults.hang_up_before_headers(), "end"),
        (faults.silence(), "silent"),
    ],
)
def test_nothing_comes_before_the_head(upstream: Upstream, fault: Behaviour, how: str) -> None:
    assert answer_to(upstream, fault) == (b"", how)


def test_a_head_without_anything_after_it(upstream: Upstream) -> None:
    received, how = answer_to(upstream, faults.headers_then_silence())
    assert how == "silent"
    assert received.endswith(b"\r\n\r\n")
    assert b"200 OK" in received


def test_characters_and_events_arrive_cut_and_whole_in_the_end(upstream: Upstream) -> None:
    upstream.behave(faults.every_byte())
    response = httpx.post(f"{upstream.url}/v1/chat/completions", json={"stream": True})
    for text in ("na\u00efve ", "\u6c34\u8def ", "\U0001f4a7", "\u2028"):
        assert text in response.text


@pytest.mark.parametrize(
    ("fault", "mark"),
    [
        (faults.garbage_event(2), b"[oops"),
        (faults.binary_event(), b"\xfe\xff\x80"),
        (faults.bad_utf8(), b"\x80\xe2\x82"),
        (faults.error_in_200(), b"the model runner crashed"),
        (faults.error_in_200(4), b"the model runner crashed"),
        (faults.html(), b"<!doctype html>"),
        (faults.noise(), bytes(range(256))),
        (faults.not_http(), bytes(range(256))),
        (faults.wrong_content_type(), b"Content-Type: text/plain"),
        (faults.done_first(), b"\r\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n"),
        (faults.empty(), b"no-cache\r\n\r\n0\r\n\r\n"),
        (faults.leaky(), b"Set-Cookie: upstream_session=abc"),
        (answers.unauthorized(), b"provided: Bearer sk-test"),
        (answers.context_too_long(), b"context_length_exceeded"),
        (answers.content_policy(), b"content_policy_violation"),
        (faults.huge_headers(), b"h" * 1024 * 1024),
        (faults.flood_of_1xx(500), b"HTTP/1.1 102 Processing\r\n\r\n" * 500 + b"HTTP/1.1 200 OK"),
    ],
)
def test_what_is_wrong_is_in_the_answer(upstream: Upstream, fault: Behaviour, mark: bytes) -> None:
    assert mark in answer_to(upstream, fault)[0]


def test_a_stream_that_is_complete_but_for_done(upstream: Upstream) -> None:
    for fault, how in ((faults.no_done(), "end"), (faults.finished_then(), "reset")):
        received, ended = answer_to(upstream, fault)
        assert ended == how
        assert b'"finish_reason":"stop"' in received
        assert b"[DONE]" not in received


def test_half_a_json_body(upstream: Upstream) -> None:
    received, how = answer_to(upstream, faults.cut_json(), stream=False)
    head, _, body = received.partition(b"\r\n\r\n")
    assert how == "end"
    assert b"Content-Length: %d\r\n" % len(body) not in head


def test_a_huge_body_is_made_as_it_is_read(upstream: Upstream) -> None:
    upstream.behave(faults.huge_line())
    connection = ask(upstream)
    assert connection.recv(1024)
    received = 0
    while received < 8 * 1024 * 1024:
        received += len(connection.recv(1 << 20))
    connection.close()
    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)
    assert 8 * 1024 * 1024 <= upstream.ledger.last.bytes_sent < 32 * 1024 * 1024


def test_a_gzip_bomb_is_valid_and_unpacks_to_what_it_says(upstream: Upstream) -> None:
    received, _ = answer_to(upstream, faults.gzip_bomb(8), stream=False)
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"Content-Encoding: gzip" in head
    assert len(body) < 100_000
    assert gzip.decompress(body) == bytes(8 * 1024 * 1024)


def test_a_redirect_leads_to_a_trap_that_notices_a_visit(upstream: Upstream) -> None:
    with Trap() as trap:
        upstream.behave(faults.redirect(307, f"{trap.url}/v1"))
        response = httpx.post(f"{upstream.url}/v1/chat/completions", json={})
        assert (response.status_code, response.headers["location"]) == (307, f"{trap.url}/v1")
        assert not trap.touched
        socket.create_connection((ports.LOOPBACK, trap.port)).close()
        trap.ledger.wait_for(lambda ledger: trap.touched)


def test_a_kept_connection_is_closed_when_it_is_used_again(upstream: Upstream) -> None:
    upstream.behave(faults.closes_reused())
    connection = http.client.HTTPConnection(ports.LOOPBACK, upstream.port, timeout=5)
    connection.request("POST", "/v1/chat/completions", "{}")
    assert connection.getresponse().read()
    connection.request("POST", "/v1/chat/completions", "{}")
    with pytest.raises(http.client.RemoteDisconnected):
        connection.getresponse()
    connection.close()


@pytest.mark.parametrize("reset", [False, True])
def test_a_connection_closes_after_its_answer(upstream: Upstream, reset: bool) -> None:
    upstream.behave(faults.close_after_answer(reset=reset))
    connection = ask(upstream, stream=False)
    received, how = everything(connection, until_closed=True)
    assert how == ("reset" if reset else "end")
    assert b"word5" in received


def test_a_fault_can_be_asked_for_by_model(upstream: Upstream) -> None:
    received, how = everything(ask(upstream, model="do-rst_after:2"))
    assert (received.count(b"word"), how) == (2, "reset")
    assert b"word5" in everything(ask(upstream, model="do-what-nobody-knows"))[0]


# -- ports and processes -----------------------------------------------------------------------------------------------


def test_a_blackhole_lets_connecting_hang_and_a_closed_port_refuses() -> None:
    with ports.blackhole() as port, pytest.raises(TimeoutError):
        socket.create_connection((ports.LOOPBACK, port), timeout=0.3)
    with ports.closed_port() as port, pytest.raises(ConnectionRefusedError):
        socket.create_connection((ports.LOOPBACK, port), timeout=0.3)


def test_killing_a_process_ends_what_it_started_and_its_log_is_shown() -> None:
    process = Process(["/bin/sh", "-c", "echo hello; sleep 60 & sleep 60; true"], name="a shell")
    process.wait_until(lambda: len(descendants(process.pid)) == 2, timeout=5)
    family = process.family()
    assert all(map(runs, family))
    process.kill()
    assert not any(map(runs, family))
    assert process.logs() == "hello\n"
    with pytest.raises(StartFailed, match=r"(?s)ended with 3.*why it failed"):
        Process(["/bin/sh", "-c", "echo why it failed; exit 3"], name="b").wait_until(
            lambda: False, timeout=5
        )


# -- the real servers --------------------------------------------------------------------------------------------------


def test_postgresql_starts_copies_a_database_survives_a_kill_and_stops() -> None:
    with Postgres() as server:
        server.create_database("first")
        with psycopg.connect(server.database("first")) as connection:
            connection.execute("CREATE TABLE kept (n int)")
        server.create_database("second", template="first")
        server.kill()
        server.start()
        assert server.execute("SELECT count(*) FROM kept", database="second") == [(0,)]
        server.pause()
        assert not server.answers()
        server.resume()
        assert server.answers()
        server.drop_database("second")
        port, folder = server.port, server.folder
        assert folder.stat().st_mode & 0o077 == 0
        with pytest.raises(psycopg.OperationalError, match="password"):
            psycopg.connect(f"postgresql://penstock:wrong@{ports.LOOPBACK}:{port}/postgres")
    assert not ports.accepts(port)
    assert not folder.exists()


@pytest.mark.parametrize("tcp", [False, True])
def test_valkey_starts_pauses_restarts_at_its_address_and_stops(tcp: bool) -> None:
    with Valkey(tcp=tcp) as server:
        with redis.from_url(server.database(3), socket_timeout=0.3) as client:
            assert client.set("a", "1")
            server.pause()
            with pytest.raises(redis.TimeoutError):
                client.get("a")
            server.resume()
            assert client.get("a") == b"1"
        server.restart()
        with redis.from_url(server.database(3)) as client:
            assert client.get("a") is None
        folder = server.folder
    assert not folder.exists()


def test_llama_chats_calls_a_tool_asks_for_its_key_and_restarts_on_its_port() -> None:
    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "river"}],
        "max_tokens": 8,
    }
    with Llama(key="k") as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.post("/v1/chat/completions", json=chat).status_code == 401
        client.headers["Authorization"] = "Bearer k"
        assert client.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 8
        calling = {**chat, "max_tokens": 300, "tools": [WEATHER], **must_call_a_tool()}
        choice = client.post("/v1/chat/completions", json=calling).json()["choices"][0]
        assert choice["finish_reason"] == "tool_calls"
        arguments = json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"])
        assert arguments["city"] in {"Rome", "Oslo"}
        port = server.port
        server.restart()
        assert server.port == port
        assert server.healthy()
    assert not ports.accepts(port)


def test_llama_answers_embeddings() -> None:
    with Llama(embeddings=True, alias="vectors") as server:
        answer = httpx.post(
            f"{server.url}/v1/embeddings", json={"model": "vectors", "input": "water"}, timeout=30
        )
        assert len(answer.json()["data"][0]["embedding"]) == 64


# -- the product -------------------------------------------------------------------------------------------------------


def test_a_gateway_starts_serves_is_killed_and_serves_again(upstream: Upstream) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "river"}]}
    with Gateway(database="sqlite", start=False) as gateway:
        key = gateway.provide(f"{upstream.url}/v1", api_key="sk-upstream-0123456789")
        gateway.start()
        with gateway.client(key) as client:
            assert client.post("/v1/chat/completions", json=chat).json()["usage"]["completion_tokens"] == 5
        assert upstream.ledger.last.headers["authorization"] == "Bearer sk-upstream-0123456789"
        gateway.kill9()
        assert not gateway.ready()
        gateway.start()
        with gateway.client(key) as client:
            assert client.post("/v1/chat/completions", json=chat).status_code == 200
        folder, port = gateway.folder, gateway.port
    assert not folder.exists()
    assert not ports.accepts(port)
