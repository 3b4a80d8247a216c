"""What strangers and providers send too much of, too slowly, or framed in two ways: R30, R32 to R35, on the product itself."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from tests.config.test_server import BAD_CHUNKS, REFUSED_HEADS
from tests.security.conftest import rss, statuses
from tests.support import faults, soak
from tests.support.gateway import Gateway
from tests.support.http_server import Behaviour, Exchange
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HELLO = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
GIB = 1024**3
CONSOLE_LIMIT = 2_621_440


@pytest.fixture(scope="module")
def greedy() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def client(plain: Gateway, greedy: Upstream) -> Iterator[httpx.Client]:
    """An application whose requests all go to `greedy`."""
    key = plain.provide(f"{greedy.url}/v1", api_key="sk-upstream-0123456789")
    with plain.client(key) as made:
        made.post("/v1/chat/completions", json=HELLO).raise_for_status()
        yield made


# -- from providers (R30) ----------------------------------------------------------------------------------------------


def huge_error(size: int = GIB) -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(500, {"Content-Type": "application/json"})
        for _ in range(size // 65_536):
            await exchange.body(b"x" * 65_536)
        await exchange.end()

    return behave


def huge_comment() -> Behaviour:
    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, {"Content-Type": "text/event-stream"})
        await exchange.body(b": ")
        for _ in range(GIB // 65_536):
            await exchange.body(b"x" * 65_536)
        await exchange.end()

    return behave


@contextlib.contextmanager
def memory_of(gateway: Gateway) -> Iterator[Callable[[], float]]:
    """By how many million bytes the web process grows while the block runs, at its highest."""
    pid = gateway.process().pid
    before, highest, stop = rss(pid), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            highest[0] = max(highest[0], rss(pid) - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda: highest[0]
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize(
    "fault",
    [faults.huge_line(), faults.huge_json(), huge_error(), huge_comment()],
    ids=["line", "json", "error", "comment"],
)
def test_r30_a_gigabyte_from_a_provider_costs_less_than_32_megabytes(
    plain: Gateway, client: httpx.Client, greedy: Upstream, fault: Behaviour, stream: bool
) -> None:
    grown = []
    # Twice, since a process may grow for reasons of its own meanwhile; what a request costs, it costs each time.
    for _ in range(2):
        greedy.reset()
        # A success in between, or the breaker would answer for the provider.
        client.post("/v1/chat/completions", json=HELLO).raise_for_status()
        greedy.behave(fault)
        with memory_of(plain) as growth:
            answer = client.post("/v1/chat/completions", json={**HELLO, "stream": stream})
        assert answer.status_code == 502
        grown.append(growth())
    assert min(grown) < 32
    assert greedy.ledger.last.bytes_sent < 128e6
    assert len(answer.content) < 4096


# -- from callers (R34) ------------------------------------------------------------------------------------------------


def raw(gateway: Gateway, head: str, blocks: int, block: bytes = b"x" * 65_536) -> tuple[bytes, int]:
    """What the server answers to this head and so many blocks of body, and how many bytes of body it let us send."""
    sent = 0
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as wire:
        wire.sendall(head.replace("\n", "\r\n").encode() + b"\r\n\r\n")
        wire.setblocking(False)
        answer, deadline = b"", time.monotonic() + 15
        while time.monotonic() < deadline:
            try:
                part = wire.recv(65_536)
                answer += part
                if not part:
                    return answer, sent
            except BlockingIOError:
                pass
            except ConnectionResetError:
                return answer, sent
            if blocks and not answer:
                try:
                    sent += wire.send(block)
                    blocks -= 1
                except BlockingIOError:
                    time.sleep(0.001)
                except (BrokenPipeError, ConnectionResetError):
                    blocks = 0
            else:
                time.sleep(0.002)
    raise AssertionError(f"no end after {sent} bytes: {answer!r}")


CONSOLE = [
    "/api/v1/providers",
    "/api/v1/servers",
    "/api/v1/auth/token",
    "/api/nothing",
    "/admin/login/",
    "/nothing",
]
KINDS = ["application/json", "multipart/form-data; boundary=x", "application/x-www-form-urlencoded"]


@pytest.mark.parametrize("path", CONSOLE)
@pytest.mark.parametrize("kind", KINDS)
def test_r34_the_console_refuses_a_body_above_its_limit_unread(plain: Gateway, path: str, kind: str) -> None:
    """The length is enough; and whoever brings nothing may send no more than a login is long."""
    head = f"POST {path} HTTP/1.1\nHost: localhost\nContent-Type: {kind}\n"
    known = f"{head}Authorization: Bearer x\nContent-Length: {CONSOLE_LIMIT + 1}"
    answer, sent = raw(plain, known, blocks=0)
    assert (statuses(answer), sent) == ([413], 0)
    answer, sent = raw(plain, f"{head}Content-Length: 200000", blocks=0)
    assert (statuses(answer), sent) == ([401], 0)
    assert b"connection: close" in answer.lower()
    assert b"cache-control: no-store" in answer.lower()


def test_r34_the_console_stops_reading_a_chunked_body_at_its_limit(plain: Gateway) -> None:
    block = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    head = "POST /api/v1/providers HTTP/1.1\nHost: localhost\nTransfer-Encoding: chunked\n"
    with memory_of(plain) as growth:
        answer, _ = raw(plain, f"{head}Authorization: Bearer x", blocks=4000, block=block)
        assert statuses(answer) == [413]
        answer, _ = raw(plain, f"{head}Content-Type: application/json", blocks=4000, block=block)
        assert statuses(answer) == [401]
    assert growth() < 2 * CONSOLE_LIMIT / 1e6 + 8


def test_r34_a_login_and_a_large_change_fit(plain: Gateway, root: httpx.Client) -> None:
    body = {"name": "wide", "base_url": "http://localhost:9", "models": [f"m{n}" for n in range(1500)]}
    assert len(json.dumps(body)) > 16_384 // 2
    assert root.post("/api/v1/servers", json=body).status_code == 201
    spaces = json.dumps({**body, "name": "padded"}) + " " * (CONSOLE_LIMIT - 100_000)
    answer = root.post("/api/v1/servers", content=spaces, headers={"Content-Type": "application/json"})
    assert answer.status_code == 201


# -- JSON that is meant to hurt (R35, contract section 6) --------------------------------------------------------------


def nested(depth: int, fields: dict[str, Any] | None = None) -> bytes:
    inner = b'{"a":' * depth + b"1" + b"}" * depth
    start = json.dumps(fields or {"name": "x"})[1:-1].encode()
    return b"{" + start + b',"metadata":' + inner + b"}"


BOMBS = {
    "depth": b"[" * 100_000,
    "deep and whole": nested(900),
    "deep where writers give up": nested(300, {"name": "x", "base_url": "http://localhost:9"}),
    "keys": b"{" + b",".join(b'"k%d":1' % n for n in range(200_000)) + b"}",
    "values": b"[" + b"[]," * 800_000 + b"1]",
    "digits": b'{"priority":' + b"9" * 5000 + b"}",
    "huge": b'{"priority":1e400}',
    "NaN": b'{"priority":NaN}',
    "half a pair": b'{"name":"\\ud800"}',
    "NUL": b'{"name":"\\u0000"}',
    "twice": b'{"name":"a","name":"b"}',
    "mark": b"\xef\xbb\xbf{}",
    "UTF-16": '{"name":"a"}'.encode("utf-16"),
    "Latin-1": b'{"name":"\xe9"}',
    "list": b"[1]",
    "text": b'"x"',
    "null": b"null",
    "nothing": b"",
    "64 bits": b'{"name":"x","base_url":"http://localhost:9","priority":9223372036854775808}',
    "control": b'{"name":"x","base_url":"http://localhost:9","custom_headers":{"X":"a\\r\\nb"}}',
}
DOORS = [
    "/api/v1/servers",
    "/api/v1/providers",
    "/api/v1/providers/test-direct",
    "/api/v1/api-keys",
    "/api/v1/gateway-keys",
    "/api/v1/active",
    "/api/v1/auth/token",
    "/api/v1/auth/token/refresh",
]


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
def test_r35_the_control_plane_refuses_json_that_is_meant_to_hurt(root: httpx.Client, bomb: bytes) -> None:
    for path in DOORS:
        began = time.monotonic()
        answer = root.post(path, content=bomb, headers={"Content-Type": "application/json"})
        assert answer.status_code == 400, (path, answer.text[:200])
        assert answer.json()["error"]["code"] == "VALIDATION_ERROR"
        assert len(answer.content) < 8192
        # The promise is 200 ms of the server's time; sending megabytes on a busy machine is not in it.
        assert time.monotonic() - began < 4, path


@pytest.mark.parametrize("depth", [150, 250, 260, 500, 900, 960, 970, 980, 1000])
def test_r35_no_depth_is_an_error_of_ours(pair: House, depth: int) -> None:
    """Readers and writers of JSON give up at different depths; what is let in can be written again."""
    body = nested(depth, HELLO)
    headers = {"x-api-key": pair.key, "Content-Type": "application/json"}
    answer = httpx.post(f"{pair.url}/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == (200 if depth < 190 else 400), answer.text
    with connect(f"{pair.url.replace('http', 'ws')}/ws/chat", additional_headers=headers) as socket:
        socket.send(b'{"id":"r1",'.decode() + body.decode()[1:])
        kind = json.loads(socket.recv(timeout=5))["type"]
    assert kind == ("chunk" if depth < 190 else "error")


def test_r35_a_number_beyond_64_bits_does_not_end_a_socket(pair: House) -> None:
    with connect(
        f"{pair.url.replace('http', 'ws')}/ws/chat", additional_headers={"x-api-key": pair.key}
    ) as socket:
        socket.send(json.dumps({"id": "r1", **HELLO, "seed": 2**70}))
        assert json.loads(socket.recv(timeout=5))["type"] == "chunk"


# -- framing (R33) -----------------------------------------------------------------------------------------------------

TARGETS = [b"/v1/chat/completions", b"/admin/login/", b"/api/v1/auth/token"]


@pytest.mark.parametrize("target", TARGETS)
def test_r33_every_ambiguous_request_gets_one_refusal_and_the_connection_ends(
    plain: Gateway, target: bytes
) -> None:
    next_one = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n\r\n"
    chunked = b"POST " + target + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    corpus = [head.replace(b" /echo ", b" " + target + b" ") for head in REFUSED_HEADS.values()]
    corpus += [chunked + body for body in BAD_CHUNKS.values()]
    for data in corpus:
        with socket.create_connection(("127.0.0.1", plain.port), timeout=5) as wire:
            wire.sendall(data + next_one)
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while part := wire.recv(65_536):
                    answer += part
        found = statuses(answer)
        # A bad chunk may come after an answer that needed no body, after which the connection has ended as well.
        assert len(found) == 1 and found[0] in {400, 401, 403, 408}, (data, answer)


# -- slowness (R32) ----------------------------------------------------------------------------------------------------


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_r32_a_thousand_heads_and_a_thousand_bodies_that_never_end_are_cut_and_nobody_else_waits(
    plain: Gateway, client: httpx.Client, greedy: Upstream
) -> None:
    """Half never end their head, half send a byte of their body every five seconds; on `manage.py serve` as shipped."""
    greedy.reset()
    usual = [timed(client) for _ in range(200)]
    files = open_files(plain)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    key = client.headers["Authorization"].encode()
    kind = b"Content-Type: application/json\r\nContent-Length: 9999\r\nAuthorization: "
    body = head + kind + key + b"\r\n\r\n{"
    slow = [(Slow(plain.port, head if n % 2 else body), 15.0 if n % 2 else 35.0) for n in range(2000)]
    most, took, cut = open_files(plain), list[float](), {15.0: 0.0, 35.0: 0.0}
    while waiting := [(each, limit) for each, limit in slow if each.open]:
        for each, limit in waiting:
            each.drip()
            cut[limit] = max(cut[limit], each.age)
            assert each.age < limit, "a slow caller is still connected"
        most = max(most, open_files(plain))
        took.append(timed(client))
        time.sleep(0.05)
    began = time.monotonic()
    while open_files(plain) > files + 10:
        assert time.monotonic() - began < 60
        time.sleep(0.1)
    before, during = soak.percentile(usual, 0.99), soak.percentile(took, 0.99)
    soak.say(
        heads_cut_after=f"{cut[15.0]:.1f} s",
        bodies_cut_after=f"{cut[35.0]:.1f} s",
        p99=f"{before * 1000:.0f} ms before and {during * 1000:.0f} ms meanwhile",
        files=f"{files} before, {most} at most, {open_files(plain)} after",
    )
    assert most >= 2000
    # The callers live in this process and cost it more than they cost the gateway; hence what is added.
    assert during < 2 * before + 0.1


def timed(client: httpx.Client) -> float:
    """Seconds that a valid request takes."""
    began = time.monotonic()
    client.post("/v1/chat/completions", json=HELLO).raise_for_status()
    return time.monotonic() - began


def open_files(gateway: Gateway) -> int:
    return len(list(Path(f"/proc/{gateway.process().pid}/fd").iterdir()))


class Slow:
    """A caller that sends a byte every five seconds."""

    def __init__(self, port: int, beginning: bytes) -> None:
        self._wire = socket.create_connection(("127.0.0.1", port), timeout=5)
        self._wire.sendall(beginning)
        self._wire.setblocking(False)
        self._began = self._last = time.monotonic()
        self.open = True

    @property
    def age(self) -> float:
        """Seconds since it connected."""
        return time.monotonic() - self._began

    def drip(self) -> None:
        if not self.open:
            return
        try:
            if self._wire.recv(4096) == b"":
                self._end()
                return
        except BlockingIOError:
            pass
        except ConnectionResetError:
            self._end()
            return
        if time.monotonic() - self._last > 5:
            self._last = time.monotonic()
            with contextlib.suppress(OSError):
                self._wire.send(b"a")

    def _end(self) -> None:
        self.open = False
        self._wire.close()
