"""The server on raw sockets: what it refuses, when it gives up waiting, and how it stops."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from config.workers import Workers

pytestmark = pytest.mark.no_database

TOY = Path(__file__).with_name("toy_server.py")
GET = b"GET /echo HTTP/1.1\r\nHost: a\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: a\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = b"GET /echo?smuggled HTTP/1.1\r\nHost: a\r\n\r\n"
WEBSOCKET = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)
SHORT = {
    "head_seconds": 0.4,
    "body_seconds": 0.7,
    "idle_seconds": 0.4,
    "write_seconds": 0.7,
    "linger_seconds": 0.2,
    "sweep_seconds": 0.05,
}
STATUS = re.compile(rb"HTTP/1\.1 ([0-9]{3}) ")


@dataclass
class Toy:
    """A running toy server."""

    process: subprocess.Popen[str]
    port: int

    def dial(self) -> socket.socket:
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=5)
        sock.settimeout(5)
        return sock

    def ask(self, data: bytes) -> bytes:
        """Everything the server answers until it closes the connection, which it must do by itself."""
        with self.dial() as sock:
            sock.sendall(data)
            return read_to_end(sock)

    def seen(self) -> dict[str, int]:
        """How many requests reached the application, and how many callers left it."""
        answer = self.ask(b"GET /seen HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        result: dict[str, int] = json_of(answer)
        return result

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(timeout=20)

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()


def launch(**options: Any) -> Toy:
    options.setdefault("limits", {"sweep_seconds": 0.05})
    options["limits"].setdefault("grace_seconds", 0.0)
    command = [sys.executable, str(TOY), json.dumps(options)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    return Toy(process, int(process.stdout.readline()))


def wait_ready(toy: Toy) -> None:
    until(lambda: toy.process.poll() is not None or answers(toy))
    assert toy.process.poll() is None, toy.errors()


def answers(toy: Toy) -> bool:
    try:
        toy.dial().close()
    except OSError:
        return False
    return True


def until(true: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture
def serve() -> Iterator[Callable[..., Toy]]:
    """Starts toy servers of the test's own, and ends what is left of them."""
    toys: list[Toy] = []

    def start(*, ready: bool = True, **options: Any) -> Toy:
        toy = launch(**options)
        toys.append(toy)
        if ready:
            wait_ready(toy)
        return toy

    yield start
    for toy in toys:
        end(toy)


def end(toy: Toy) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(toy.process.pid, signal.SIGKILL)  # Its workers too, which would hold the pipes open.
    toy.process.communicate()


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    """One server with the usual limits for all tests that do not stop it."""
    server = launch()
    wait_ready(server)
    yield server
    end(server)


@pytest.fixture(scope="module")
def impatient() -> Iterator[Toy]:
    """The same with short deadlines."""
    server = launch(limits=dict(SHORT))
    wait_ready(server)
    yield server
    end(server)


def readable(sock: socket.socket) -> bool:
    return bool(select.select([sock], [], [], 0)[0])


def read_to_end(sock: socket.socket) -> bytes:
    data = b""
    while block := sock.recv(65536):
        data += block
    return data


def read_answer(sock: socket.socket) -> bytes:
    """One response with a Content-Length, and no byte of the next."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += sock.recv(1)
    length = int(header(data, b"content-length"))
    body = b""
    while len(body) < length:
        body += sock.recv(length - len(body))
    return data + body


def header(answer: bytes, name: bytes) -> bytes:
    for line in answer.split(b"\r\n\r\n")[0].split(b"\r\n")[1:]:
        key, _, value = line.partition(b": ")
        if key.lower() == name:
            return value
    return b""


def json_of(answer: bytes) -> Any:
    return json.loads(answer.split(b"\r\n\r\n")[-1])


def statuses(answer: bytes) -> list[int]:
    return [int(status) for status in STATUS.findall(answer)]


# -- framing (R33) and heads (R12, R40) -------------------------------------------------------------------------------

REFUSED_HEADS = {
    "length and chunked": POST + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    "two equal lengths": POST + b"Content-Length: 4\r\nContent-Length: 4\r\n\r\nabcd",
    "two lengths": POST + b"Content-Length: 4\r\nContent-Length: 0\r\n\r\n",
    "list of lengths": POST + b"Content-Length: 4, 4\r\n\r\nabcd",
    "signed length": POST + b"Content-Length: +4\r\n\r\nabcd",
    "negative length": POST + b"Content-Length: -1\r\n\r\n",
    "empty length": POST + b"Content-Length: \r\n\r\n",
    "huge length": POST + b"Content-Length: 99999999999999999999\r\n\r\n",
    "xchunked": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "identity": POST + b"Transfer-Encoding: identity\r\n\r\n",
    "gzip, chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "space before colon": POST + b"Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    "vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "folded header": GET + b"X: a\r\n b\r\n\r\n",
    "folded first header": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "bare LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "one bare LF": b"GET / HTTP/1.1\r\nHost: a\nX: b\r\n\r\n",
    "bare CR": b"GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
    "NUL in value": GET + b"X: a\0b\r\n\r\n",
    "NUL in name": GET + b"X\0: a\r\n\r\n",
    "NUL in target": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "encoded NUL in path": b"GET /%00 HTTP/1.1\r\nHost: a\r\n\r\n",
    "control in value": GET + b"X: a\x01b\r\n\r\n",
    "DEL in value": GET + b"X: a\x7fb\r\n\r\n",
    "invalid UTF-8": GET + b"X: \xff\r\n\r\n",
    "invalid UTF-8 key": GET + b"Authorization: Bearer \xff\xfe\r\n\r\n",
    "no header name": GET + b": a\r\n\r\n",
    "two Authorization": GET + b"Authorization: Bearer a\r\nauthorization: Bearer b\r\n\r\n",
    "no Host": b"GET / HTTP/1.1\r\n\r\n",
    "no Host in HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "two Hosts": GET + b"HOST: a\r\n\r\n",
    "empty Host": b"GET / HTTP/1.1\r\nHost:\r\n\r\n",
    "Host with a path": b"GET / HTTP/1.1\r\nHost: a/health?#\r\n\r\n",
    "Host with user": b"GET / HTTP/1.1\r\nHost: a@b\r\n\r\n",
    "Host with two ports": b"GET / HTTP/1.1\r\nHost: a:1:2\r\n\r\n",
    "list of Hosts": b"GET / HTTP/1.1\r\nHost: a, b\r\n\r\n",
    "HTTP/0.9": b"GET /\r\nHost: a\r\n\r\n",
    "HTTP/2.0": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "fragment": b"GET /a#b HTTP/1.1\r\nHost: a\r\n\r\n",
    "asterisk": b"GET * HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target of another host": b"GET http://b/echo HTTP/1.1\r\nHost: a\r\n\r\n",
    "absolute target with user": b"GET http://a@b/echo HTTP/1.1\r\nHost: a\r\n\r\n",
    "lower case method": b"get / HTTP/1.1\r\nHost: a\r\n\r\n",
    "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "upgrade with a body": POST + b"Connection: upgrade\r\nUpgrade: tls/1.2\r\nContent-Length: 45\r\n\r\n",
    "websocket with a body": WEBSOCKET + b"Content-Length: 45\r\n\r\n",
    "websocket with two Hosts": WEBSOCKET + b"Host: b\r\n\r\n",
    "websocket with early frames": WEBSOCKET + b"\r\n\x81\x00",
}


@pytest.mark.parametrize("request_bytes", REFUSED_HEADS.values(), ids=REFUSED_HEADS.keys())
def test_r33_an_ambiguous_head_gets_one_400_and_the_connection_closes(toy: Toy, request_bytes: bytes) -> None:
    before = toy.seen()["requests"]
    answer = toy.ask(request_bytes + NEXT)
    assert statuses(answer) == [400]
    assert header(answer, b"connection") == b"close"
    assert header(answer, b"cache-control") == b"no-store"
    assert header(answer, b"server") == b""
    body = json_of(answer)
    assert body["error"]["code"] == "invalid_request"
    assert body["error"]["param"] is None
    assert body["request_id"].encode() == header(answer, b"x-request-id")
    assert toy.seen()["requests"] == before


BAD_CHUNKS = {
    "bad terminator": b"3\r\nabcXX0\r\n\r\n",
    "CR only": b"3\r\nabc\r0\r\n\r\n",
    "bare LF": b"3\nabc\n0\n\n",
    "LF in extension": b"3;a\nb\r\nabc\r\n0\r\n\r\n",
    "space after size": b"3 \r\nabc\r\n0\r\n\r\n",
    "negative": b"-3\r\nabc\r\n0\r\n\r\n",
    "prefixed": b"0x3\r\nabc\r\n0\r\n\r\n",
    "overflow": b"fffffffffffffffff\r\nabc",
    "empty": b"\r\nabc\r\n0\r\n\r\n",
    "length as trailer": b"0\r\nContent-Length: 5\r\n\r\n",
    "chunked as trailer": b"0\r\nTransfer-Encoding: chunked\r\n\r\n",
}


@pytest.mark.parametrize("body", BAD_CHUNKS.values(), ids=BAD_CHUNKS.keys())
def test_r33_a_bad_chunk_gets_one_400_and_the_application_is_told(toy: Toy, body: bytes) -> None:
    before = toy.seen()["left"]
    assert statuses(toy.ask(CHUNKED + body + NEXT)) == [400]
    until(lambda: toy.seen()["left"] == before + 1)


def test_r33_a_bad_chunk_after_the_response_began_is_not_answered_again(toy: Toy) -> None:
    with toy.dial() as sock:
        sock.sendall(b"POST /stubborn HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
        begin = sock.recv(4096)
        sock.sendall(b"3\r\nabcXX" + NEXT)
        assert statuses(begin + read_to_end(sock)) == [200]


@pytest.mark.parametrize("method", [b"TRACE / ", b"CONNECT a:80 "])
def test_trace_and_connect_are_405(toy: Toy, method: bytes) -> None:
    answer = toy.ask(method + b"HTTP/1.1\r\nHost: a\r\n\r\n" + NEXT)
    assert statuses(answer) == [405]
    assert b"GET" in header(answer, b"allow")


@pytest.mark.parametrize(
    "head",
    [
        GET + b"X: " + b"a" * 66_000 + b"\r\n\r\n",
        GET + b"X: " + b"a" * 1_000_000,
        GET + b"Authorization: Bearer " + b"a" * 1_000_000 + b"\r\n\r\n",
        GET + b"X: aaaaaaaaaa\r\n" * 5_000 + b"\r\n",
        b"GET /" + b"a" * 66_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n",
        WEBSOCKET + b"X: " + b"a" * 9_000 + b"\r\n\r\n",
    ],
    ids=["one header", "endless", "key", "many headers", "target", "websocket"],
)
def test_r12_a_head_beyond_the_limit_is_431(toy: Toy, head: bytes) -> None:
    answer = toy.ask(head)
    assert statuses(answer) == [431]
    assert json_of(answer)["error"]["code"] == "request_too_large"


def test_a_head_just_below_the_limit_is_served_whole_or_in_pieces(toy: Toy) -> None:
    head = GET + b"Connection: close\r\nX: " + b"a" * 60_000 + b"\r\n\r\n"
    assert statuses(toy.ask(head)) == [200]
    with toy.dial() as sock:
        for start in range(0, len(head), 20_000):
            sock.sendall(head[start : start + 20_000])
            time.sleep(0.02)
        assert statuses(read_to_end(sock)) == [200]


@pytest.mark.parametrize("host", [b"localhost:8000", b"127.0.0.1", b"[::1]:80", b"a.b-c.example", b"my_host"])
def test_a_valid_host_is_served(toy: Toy, host: bytes) -> None:
    assert statuses(toy.ask(b"GET / HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n")) == [200]


def test_r40_an_absolute_target_means_the_same_as_its_path(toy: Toy) -> None:
    answer = toy.ask(b"GET http://A:80/v1/x?y=1 HTTP/1.1\r\nHost: a:80\r\nConnection: close\r\n\r\n")
    assert (json_of(answer)["path"], json_of(answer)["query"]) == ("/v1/x", "y=1")


def test_r40_header_names_with_an_underscore_and_trailers_never_reach_the_application(toy: Toy) -> None:
    head = POST + b"X_Real_IP: 1.2.3.4\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = json_of(toy.ask(head + b"3\r\nabc\r\n0\r\nX-Real-IP: 1.2.3.4\r\nAuthorization: Bearer b\r\n\r\n"))
    assert [name for name, _ in data["headers"]] == ["host", "connection", "transfer-encoding"]
    assert data["body"] == "abc"


@pytest.mark.parametrize("trusted", [[], ["127.0.0.0/8"]])
def test_r40_forwarded_headers_count_only_from_trusted_proxies(
    serve: Callable[..., Toy], trusted: list[str]
) -> None:
    answer = serve(trusted=trusted).ask(GET + b"X-Forwarded-For: 9.9.9.9\r\nConnection: close\r\n\r\n")
    assert json_of(answer)["client"][0] == ("9.9.9.9" if trusted else "127.0.0.1")


def test_an_upgrade_that_is_not_served_is_ignored_and_ends_the_connection(toy: Toy) -> None:
    assert statuses(toy.ask(GET + b"Connection: Upgrade\r\nUpgrade: tls/1.2\r\n\r\n" + NEXT)) == [200]


@pytest.mark.parametrize("piece", [1, 7, 10_000])
@pytest.mark.parametrize(
    "body", [b"Content-Length: 3\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"]
)
def test_an_offer_to_speak_http_2_is_passed_over(toy: Toy, body: bytes, piece: int) -> None:
    """Java's client makes one in the first request of each connection, with a body or without, and goes on with either answer."""
    offer = POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQ\r\n"
    data = offer + b"X-Kept: yes\r\n" + body
    with toy.dial() as sock:
        for start in range(0, len(data), piece):
            sock.sendall(data[start : start + piece])
        answer = json_of(read_answer(sock))
        assert answer["body"] == "abc"
        names = dict(answer["headers"])
        assert names["x-kept"] == "yes"
        assert names.keys().isdisjoint({"connection", "upgrade", "http2-settings"})
        sock.sendall(POST + b"Content-Length: 3\r\n\r\nxyz")
        assert json_of(read_answer(sock))["body"] == "xyz"


def test_an_application_that_raises_answers_json_without_the_reason(toy: Toy) -> None:
    answer = toy.ask(b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n")
    assert statuses(answer) == [500]
    assert json_of(answer)["error"]["code"] == "internal_error"
    assert b"secret" not in answer


@pytest.mark.parametrize("name", ["line-break", "bare-lf", "bare-cr", "nul", "space", "colon", "no-name"])
def test_an_answer_with_a_header_that_is_none_is_not_sent(toy: Toy, name: str) -> None:
    answer = toy.ask(b"GET /bad-header?%b HTTP/1.1\r\nHost: a\r\n\r\n" % name.encode())
    assert statuses(answer) == [500]
    assert b"x-c" not in answer
    assert b"x-a" not in answer


@pytest.mark.parametrize("said", [2, 5])
def test_an_answer_of_another_length_than_it_says_ends_the_connection(toy: Toy, said: int) -> None:
    with toy.dial() as sock:
        sock.sendall(b"GET /length?%d HTTP/1.1\r\nHost: a\r\n\r\n" % said)
        answer = read_to_end(sock)
    assert header(answer, b"content-length") == b"%d" % said
    assert len(answer.partition(b"\r\n\r\n")[2]) < max(said, 4)
    assert toy.seen()["running"] == 0


# -- keep-alive, pipelining and refused bodies (F17) ------------------------------------------------------------------


def test_f17_a_connection_is_used_again_and_each_answer_belongs_to_its_request(toy: Toy) -> None:
    with toy.dial() as sock:
        for number in range(5):
            sock.sendall(b"POST /p%d HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nab%d" % (number, number))
            data = json_of(read_answer(sock))
            assert (data["path"], data["body"]) == (f"/p{number}", f"ab{number}")


def test_f17_pipelined_requests_are_answered_in_order_and_a_bad_one_last(toy: Toy) -> None:
    requests = [b"GET /p%d HTTP/1.1\r\nHost: a\r\n\r\n" % number for number in range(4)]
    answer = toy.ask(b"".join(requests) + b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n" + NEXT)
    assert statuses(answer) == [200, 200, 200, 200, 400]
    assert re.findall(rb'"path": "(/p\d)"', answer) == [b"/p0", b"/p1", b"/p2", b"/p3"]


def test_f17_a_pipelined_request_with_a_bad_chunk_does_not_spoil_the_one_before(toy: Toy) -> None:
    first = b"GET /stream?3 HTTP/1.1\r\nHost: a\r\n\r\n"
    answer = toy.ask(first + CHUNKED + b"3\r\nabcXX" + NEXT)
    assert statuses(answer) == [200, 400]
    assert b"[DONE]" in answer


def test_a_running_request_is_told_when_a_pipelining_caller_leaves(toy: Toy) -> None:
    before = toy.seen()["left"]
    sock = toy.dial()
    sock.sendall(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n" + NEXT)
    assert sock.recv(65536)
    sock.close()
    until(lambda: toy.seen()["left"] == before + 1)


def test_f14_a_caller_that_asked_for_more_and_leaves_is_noticed_though_nothing_is_written(toy: Toy) -> None:
    before = toy.seen()["left"]
    sock = toy.dial()
    sock.sendall(b"GET /silent HTTP/1.1\r\nHost: a\r\n\r\n")
    requests = toy.seen()["requests"]
    for _ in range(3):
        sock.sendall(NEXT)
        time.sleep(0.05)  # Each is to arrive by itself.
    sock.close()
    until(lambda: toy.seen()["left"] == before + 1, seconds=5)
    assert toy.seen()["requests"] == requests  # Nobody waits for the answers to the others.


@pytest.mark.parametrize(
    "flood",
    [b"0\r\nX-Trailer: ", b"3;ext="],
    ids=["trailer", "chunk extension"],
)
def test_r34_what_never_becomes_a_body_is_bounded_as_a_head_is(toy: Toy, flood: bytes) -> None:
    with toy.dial() as sock:
        sock.sendall(CHUNKED + b"3\r\nabc\r\n" + flood)
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 4_000_000 and not readable(sock):
                sent += sock.send(b"a" * 16384)
        assert statuses(read_to_end(sock)) == [431]
    assert sent < 4_000_000


def test_trailers_of_a_usual_size_are_read_over(toy: Toy) -> None:
    trailers = b"".join(b"X-%d: %b\r\n" % (number, b"a" * 1000) for number in range(20))
    answer = toy.ask(
        CHUNKED.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        + b"3\r\nabc\r\n0\r\n"
        + trailers
        + b"\r\n"
    )
    assert json_of(answer)["body"] == "abc"


@pytest.mark.parametrize(
    "sent", [b"x" * 10, b"", b"x" * 10_000_000], ids=["all of it", "none of it", "more than fits"]
)
def test_a_request_refused_before_its_body_is_read_closes_the_connection(toy: Toy, sent: bytes) -> None:
    length = len(sent) or 10
    with toy.dial() as sock:
        sock.sendall(b"POST /unread HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % length + sent)
        answer = read_to_end(sock)
    assert statuses(answer) == [401]
    assert header(answer, b"connection") == b"close"


def test_a_refused_request_without_a_body_keeps_the_connection(toy: Toy) -> None:
    with toy.dial() as sock:
        for _ in range(2):
            sock.sendall(b"GET /unread HTTP/1.1\r\nHost: a\r\n\r\n")
            assert statuses(read_answer(sock)) == [401]


def test_a_caller_that_waits_for_100_continue_gets_it_only_when_the_body_is_wanted(toy: Toy) -> None:
    with toy.dial() as sock:
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\n")
        assert statuses(sock.recv(4096)) == [100]
        sock.sendall(b"abc")
        assert json_of(read_to_end(sock))["body"] == "abc"
    refused = POST.replace(b"/echo", b"/unread") + b"Expect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    assert statuses(toy.ask(refused)) == [401]


def test_http_1_0_is_spoken_in_its_own_words(toy: Toy) -> None:
    """No interim answer and no chunks (RFC 9110, 10.1.1; RFC 9112, 6.1): such a client takes both for the answer."""
    head = b"POST /echo HTTP/1.0\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n"
    assert statuses(toy.ask(head + b"abc")) == [200]
    answer = toy.ask(b"GET /stream?2 HTTP/1.0\r\nHost: a\r\n\r\n")
    assert b"transfer-encoding" not in answer.lower()
    assert answer.endswith(b"\r\n\r\ndata: 0\n\ndata: 1\n\ndata: [DONE]\n\n")


# -- deadlines (R32, F16) ---------------------------------------------------------------------------------------------


def trickle(sock: socket.socket, byte: bytes, seconds: float) -> bytes:
    """Send one byte every 50 ms until the server closes; fail if it does not in time."""
    data, deadline = b"", time.monotonic() + seconds
    sock.settimeout(0.05)
    while time.monotonic() < deadline:
        try:
            block = sock.recv(65536)
            if not block:
                return data
            data += block
        except TimeoutError:
            sock.sendall(byte)
    raise AssertionError("the server let a slow caller go on")


def test_r32_a_head_that_comes_byte_by_byte_is_cut(impatient: Toy) -> None:
    with impatient.dial() as sock:
        sock.sendall(GET + b"X: ")
        answer = trickle(sock, b"a", seconds=2)
    assert statuses(answer) == [408]
    assert json_of(answer)["error"]["code"] == "request_timeout"


def test_r32_a_first_head_is_timed_from_the_accept(serve: Callable[..., Toy]) -> None:
    toy = serve(limits={**SHORT, "head_seconds": 1.5})
    with toy.dial() as sock:
        began = time.monotonic()
        time.sleep(1.3)
        sock.sendall(GET + b"X: ")
        assert statuses(trickle(sock, b"a", seconds=2)) == [408]
        assert time.monotonic() - began < 2.7


def test_r32_a_later_head_is_timed_from_its_first_byte(serve: Callable[..., Toy]) -> None:
    toy = serve(limits={**SHORT, "idle_seconds": 5.0})
    with toy.dial() as sock:
        sock.sendall(GET + b"\r\n")
        read_answer(sock)
        time.sleep(0.6)
        sock.sendall(GET)
        time.sleep(0.15)
        sock.sendall(b"\r\n")
        assert statuses(read_answer(sock)) == [200]


def test_r32_a_second_head_that_comes_byte_by_byte_is_cut(impatient: Toy) -> None:
    with impatient.dial() as sock:
        sock.sendall(GET + b"\r\n")
        read_answer(sock)
        sock.sendall(GET + b"X: ")
        assert statuses(trickle(sock, b"a", seconds=2)) == [408]


@pytest.mark.parametrize(
    "head", [CHUNKED + b"fff\r\n", POST + b"Content-Length: 9999\r\n\r\n", CHUNKED + b"3\r\nabc\r\n0\r\nX: "]
)
def test_r32_a_body_that_comes_byte_by_byte_is_cut_and_the_application_told(
    impatient: Toy, head: bytes
) -> None:
    before = impatient.seen()["left"]
    with impatient.dial() as sock:
        sock.sendall(head)
        assert statuses(trickle(sock, b"a", seconds=2)) == [408]
    until(lambda: impatient.seen()["left"] == before + 1)


def test_r32_a_body_that_makes_progress_may_take_longer_than_the_deadline(impatient: Toy) -> None:
    with impatient.dial() as sock:
        sock.sendall(POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % (10 * 5000))
        for _ in range(10):
            sock.sendall(b"x" * 5000)
            time.sleep(0.1)
        assert json_of(read_to_end(sock))["size"] == 50_000


def test_r32_an_idle_connection_is_closed_without_a_word(impatient: Toy) -> None:
    with impatient.dial() as sock:
        assert read_to_end(sock) == b""
    with impatient.dial() as sock:
        sock.sendall(GET + b"\r\n")
        read_answer(sock)
        assert read_to_end(sock) == b""


def test_a_slow_stream_is_not_taken_for_a_slow_caller(impatient: Toy) -> None:
    answer = impatient.ask(b"GET /stream?20 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert b"[DONE]" in answer


@pytest.mark.parametrize("request_bytes", [b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n"])
def test_f16_a_reader_that_reads_nothing_is_cut_and_the_application_told(
    impatient: Toy, request_bytes: bytes
) -> None:
    before = impatient.seen()["left"]
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        sock.connect(("127.0.0.1", impatient.port))
        sock.sendall(request_bytes)
        until(lambda: impatient.seen()["left"] == before + 1, seconds=3)


def test_f16_a_reader_that_reads_slowly_is_served(impatient: Toy) -> None:
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.settimeout(2)
        sock.connect(("127.0.0.1", impatient.port))
        sock.sendall(b"GET /flood HTTP/1.1\r\nHost: a\r\n\r\n")
        deadline = time.monotonic() + 1.2
        while time.monotonic() < deadline:
            assert len(sock.recv(262_144)) > 0
            time.sleep(0.02)


# -- WebSocket --------------------------------------------------------------------------------------------------------


def test_a_websocket_echoes_without_compression_and_closes_1009_beyond_1_mib(toy: Toy) -> None:
    from websockets.exceptions import ConnectionClosedError
    from websockets.sync.client import connect

    with connect(f"ws://127.0.0.1:{toy.port}/ws", max_size=None) as ws:
        assert ws.response is not None
        assert "sec-websocket-extensions" not in ws.response.headers
        assert "server" not in ws.response.headers
        ws.send("x" * 1024 * 1024)
        assert len(ws.recv(timeout=5)) == 1024 * 1024
        ws.send("x" * (1024 * 1024 + 1))
        with pytest.raises(ConnectionClosedError) as closed:
            ws.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1009


def test_a_websocket_handshake_cannot_be_pipelined(toy: Toy) -> None:
    answer = toy.ask(b"GET /stream?2 HTTP/1.1\r\nHost: a\r\n\r\n" + WEBSOCKET + b"\r\n")
    assert statuses(answer) == [200, 400]


def test_f16_a_websocket_reader_that_reads_nothing_is_cut(serve: Callable[..., Toy]) -> None:
    toy = serve(limits=dict(SHORT))
    with toy.dial() as sock:
        sock.sendall(WEBSOCKET + b"\r\n")
        assert statuses(sock.recv(4096)) == [101]
        sock.sendall(b"\x81\x85\0\0\0\0flood")
        connected = f"{sock.getsockname()[1]:04X}"
        until(lambda: not is_established(toy.port, connected), seconds=5)


def test_f16_a_websocket_caller_that_pings_and_reads_nothing_is_cut(serve: Callable[..., Toy]) -> None:
    """However much it sends: what waits to be taken is no progress, and no answer to a ping is kept for it."""
    toy = serve(limits=dict(SHORT))
    pings = (b"\x89\xfd\0\0\0\0" + b"p" * 125) * 500
    with toy.dial() as sock:
        sock.sendall(WEBSOCKET + b"\r\n")
        assert statuses(sock.recv(4096)) == [101]
        deadline = time.monotonic() + 8
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                sock.sendall(pings)
        assert time.monotonic() < deadline


def is_established(port: int, peer: str) -> bool:
    """Whether the kernel holds an established connection from local `port` to the hexadecimal port `peer`."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return any(f":{port:04X} " in line and f":{peer} 01 " in line for line in lines)


# -- stopping (F33) ---------------------------------------------------------------------------------------------------

STOPPING = {
    "sweep_seconds": 0.05,
    "drain_seconds": 0.6,
    "interrupt_seconds": 0.4,
    "grace_seconds": 0.2,
    "cleanup_seconds": 0.6,
}


def begin_stream(toy: Toy, target: bytes) -> socket.socket:
    sock = toy.dial()
    sock.sendall(b"GET " + target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
    assert b"200 OK" in sock.recv(4096)
    return sock


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_f33_a_running_stream_comes_to_its_end_and_the_exit_code_is_0(
    serve: Callable[..., Toy], number: signal.Signals
) -> None:
    toy = serve(limits={**STOPPING, "drain_seconds": 10.0})
    with begin_stream(toy, b"/stream?15") as sock:
        began = time.monotonic()
        assert toy.stop(number) == 0
        assert time.monotonic() - began < 5
        assert b"[DONE]" in read_to_end(sock)
    assert toy.process.stdout is not None
    assert "lifespan ended" in toy.process.stdout.read()


def test_f33_a_long_stream_is_interrupted_with_one_event_and_the_exit_code_is_0(
    serve: Callable[..., Toy],
) -> None:
    toy = serve(limits=dict(STOPPING))
    with begin_stream(toy, b"/stream?1000") as sock:
        assert toy.stop() == 0
        answer = read_to_end(sock)
    assert answer.count(b"server_shutting_down") == 1
    assert answer.endswith(b"0\r\n\r\n")


def test_f33_an_application_that_ignores_the_interruption_does_not_hold_the_exit(
    serve: Callable[..., Toy],
) -> None:
    toy = serve(limits=dict(STOPPING))
    with begin_stream(toy, b"/stubborn"):
        assert toy.stop() == 0
    assert toy.process.stdout is not None
    assert toy.process.stdout.read().split("\n")[:2] == ["cancelled", "lifespan ended"]


def test_f33_a_thread_that_never_returns_does_not_hold_the_exit(serve: Callable[..., Toy]) -> None:
    toy = serve(limits=dict(STOPPING))
    with begin_stream(toy, b"/thread"):
        assert toy.stop() == 0


def test_f33_further_signals_do_not_shorten_the_drain(serve: Callable[..., Toy]) -> None:
    toy = serve(limits={**STOPPING, "drain_seconds": 10.0})
    with begin_stream(toy, b"/stream?20") as sock:
        toy.process.send_signal(signal.SIGTERM)
        for _ in range(4):
            time.sleep(0.1)
            toy.process.send_signal(signal.SIGINT)
            toy.process.send_signal(signal.SIGTERM)
        assert toy.process.wait(timeout=10) == 0
        assert b"[DONE]" in read_to_end(sock)


def test_f33_it_accepts_during_the_grace_with_readiness_off_and_refuses_after(
    serve: Callable[..., Toy],
) -> None:
    toy = serve(limits={**STOPPING, "grace_seconds": 1.0, "drain_seconds": 10.0})
    with begin_stream(toy, b"/stream?40"), toy.dial() as kept:
        toy.process.send_signal(signal.SIGTERM)
        until(lambda: json_of(toy.ask(GET + b"Connection: close\r\n\r\n"))["draining"], seconds=0.8)
        kept.sendall(GET + b"\r\n")
        assert header(read_to_end(kept), b"connection") == b"close"
        until(lambda: not answers(toy), seconds=3)
        assert toy.process.poll() is None
        assert toy.process.wait(timeout=10) == 0


def test_f33_an_idle_server_stops_at_once_when_there_is_no_grace(serve: Callable[..., Toy]) -> None:
    toy = serve()
    with toy.dial() as sock:
        sock.sendall(GET + b"\r\n")
        read_answer(sock)
        began = time.monotonic()
        assert toy.stop(signal.SIGINT) == 0
        assert time.monotonic() - began < 1.5
        assert read_to_end(sock) == b""


def test_f33_an_idle_websocket_does_not_hold_the_exit_and_is_told_1012(serve: Callable[..., Toy]) -> None:
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    toy = serve(limits={**STOPPING, "drain_seconds": 15.0})
    with connect(f"ws://127.0.0.1:{toy.port}/ws") as ws:
        ws.send("hello")
        assert ws.recv(timeout=5) == "hello"
        began = time.monotonic()
        assert toy.stop() == 0
        assert time.monotonic() - began < 5
        with pytest.raises(ConnectionClosed) as closed:
            ws.recv(timeout=5)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1012


# -- starting, workers and the process itself -------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"fail": "the keyring is missing"}, {"raise": "the keyring is missing"}])
@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_start_says_one_line_and_exits_not_0(
    serve: Callable[..., Toy], options: dict[str, str], workers: int
) -> None:
    toy = serve(ready=False, workers=workers, **options)
    assert toy.process.wait(timeout=10) == 3
    lines = set(toy.errors().splitlines())
    assert lines == {"Penstock did not start: the keyring is missing"}


def test_a_port_in_use_is_one_line_and_exit_1(toy: Toy) -> None:
    second = [sys.executable, str(TOY), json.dumps({"port": toy.port})]
    done = subprocess.run(second, capture_output=True, text=True, timeout=10, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"port {toy.port} on 127.0.0.1 is in use")
    assert done.stderr.count("\n") == 1


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_a_killed_worker_is_replaced_and_all_drain_when_the_parent_is_told(serve: Callable[..., Toy]) -> None:
    toy = serve(workers=2, limits={**STOPPING, "drain_seconds": 10.0})
    until(lambda: len(children(toy.process.pid)) == 2)
    victim = children(toy.process.pid)[0]
    os.kill(victim, signal.SIGKILL)
    until(lambda: victim not in children(toy.process.pid) and len(children(toy.process.pid)) == 2)
    with begin_stream(toy, b"/stream?40") as sock:
        toy.process.send_signal(signal.SIGTERM)
        until(lambda: not answers(toy), seconds=1.5)  # The stream takes two seconds.
        assert toy.process.wait(timeout=10) == 0
        assert b"[DONE]" in read_to_end(sock)


def test_a_replacement_that_cannot_start_is_tried_again_while_the_others_serve(
    serve: Callable[..., Toy], tmp_path: Path
) -> None:
    away = tmp_path / "away"
    toy = serve(workers=2, notes=str(tmp_path))
    until(lambda: len(list(tmp_path.glob("started-*"))) == 2)
    victim, other = children(toy.process.pid)
    away.touch()
    os.kill(victim, signal.SIGKILL)
    until(lambda: len(list(tmp_path.glob("failed-*"))) == 2)
    assert other in children(toy.process.pid)
    assert answers(toy)
    away.unlink()
    until(lambda: len(list(tmp_path.glob("started-*"))) == 3)
    toy.process.send_signal(signal.SIGTERM)
    assert toy.process.wait(timeout=10) == 0


def test_a_stop_that_comes_while_a_worker_ends_by_itself_is_no_error() -> None:
    workers = Workers(lambda: None, count=1, sock=socket.socket())
    gone = subprocess.Popen(["true"])
    gone.wait()
    workers._pids.add(gone.pid)
    workers._stop()


def test_workers_do_not_outlive_a_killed_parent(serve: Callable[..., Toy]) -> None:
    toy = serve(workers=2)
    until(lambda: len(children(toy.process.pid)) == 2)
    workers = children(toy.process.pid)
    toy.process.kill()
    until(lambda: not any(Path(f"/proc/{pid}").exists() and not is_zombie(pid) for pid in workers), seconds=5)


def is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_r09_a_hardened_process_leaves_no_core_and_cannot_be_dumped(tmp_path: Path) -> None:
    program = (
        "import ctypes, resource, sys\n"
        f"sys.path.insert(0, {str(TOY.parents[2])!r})\n"
        "resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)\n"
        "from providers.hardening import harden_process\n"
        "harden_process()\n"
        "print(open('/proc/self/limits').read())\n"
        "print('dumpable', ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), flush=True)\n"
        "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=20, check=False
    )
    assert done.returncode == -signal.SIGSEGV, done.stderr
    assert re.search(r"Max core file size +0 +0 ", done.stdout)
    assert "dumpable 0" in done.stdout
    assert list(tmp_path.iterdir()) == []
