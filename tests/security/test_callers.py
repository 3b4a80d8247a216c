"""What callers try to make of us: a way to other hosts (R24, R26), to other people's sockets (R38), past the door by odd
paths and hosts (R40), or a service for themselves alone (R41)."""

from __future__ import annotations

import base64
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from typing import Any

import httpx
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from proxy.endpoints import NAMED, http_routes
from tests.security.conftest import PASSWORD, statuses
from tests.support import answers, faults
from tests.support.gateway import Gateway
from tests.support.inprocess import House
from tests.support.ports import LOOPBACK
from tests.support.told import CHAT, listen, question
from tests.support.upstream import Trap, Upstream

pytestmark = pytest.mark.no_database


@pytest.fixture(scope="module")
def busy() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def key(plain: Gateway, busy: Upstream) -> str:
    """A gateway key of `plain`, whose provider `busy` has the model `busy`."""
    return plain.provide(f"{busy.url}/v1", slug="busy", models=["busy"], active=False)


# -- R24: a destination is ours to choose ----------------------------------------------------------------------------------

DESTINATIONS = (
    "api_base", "base_url", "baseUrl", "custom_host", "endpoint", "url", "host", "proxy", "proxies", "api_url",
    "azure_endpoint", "target_url", "webhook", "callback_url", "redirect", "forward", "api_endpoint",
)  # fmt: skip
NESTED = ("extra_body", "metadata", "litellm_params", "config", "options", "extra_headers", "provider")
HEADERS = (
    "x-portkey-custom-host", "x-portkey-config", "x-api-base", "x-base-url", "x-forwarded-host", "x-original-url",
    "x-rewrite-url", "x-target-url", "helicone-target-url", "helicone-openai-api-base", "openai-base-url", "forwarded",
    "x-custom-host", "x-host", "x-litellm-api-base", "proxy", "x-forwarded-server", "x-http-destinationurl", "destination",
)  # fmt: skip
PATHS = [
    f"{mount}{path}{slash}"
    for mount in ("/v1", "/api/v1")
    for path in (
        "/chat/completions",
        "/models",
        "/models/tiny",
        *(f"/{name}" for name in NAMED.split("|")),
        *(f"/{name}/nested/path" for name in NAMED.split("|")),
    )
    for slash in ("", "/")
] + ["/v1", "/v1/", "/v1/anything"]


@pytest.fixture
def trap() -> Iterator[Trap]:
    with Trap() as running:
        yield running


def test_r24_the_list_of_paths_reaches_every_route_of_the_data_plane(house: House) -> None:
    """Taken from the running routes, so that a new one cannot be forgotten here."""
    routes = http_routes(house.gateway, lambda *_: None)[:-1]  # the last one hands over to the control plane
    for route in routes:
        assert any(route.pattern.match(path.removeprefix("/")) for path in PATHS), route


def misled(url: str) -> list[dict[str, Any]]:
    """Bodies that name another host in every place where some gateway has once looked for one."""
    host = url.removeprefix("http://")
    flat = {name: url if name != "proxies" else {"http": url, "https": url} for name in DESTINATIONS}
    hosts = dict.fromkeys(DESTINATIONS, host)
    headers = dict.fromkeys(HEADERS, url)
    tools = [
        {"type": "mcp", "server_url": url, **flat},
        {"type": "function", "function": {"name": "f", **flat}},
    ]
    return [
        flat,
        hosts,
        dict.fromkeys(NESTED, flat),
        {name: {inner: {"deeper": flat} for inner in NESTED} for name in NESTED},
        {"tools": tools, "tool_resources": flat, "extra_headers": headers, "headers": headers},
        {"model": f"{url}/v1/tiny", **flat},
        {"model": f"openai/{url}"},
        {"provider_id": url},
        {"provider": {"base_url": url, "slug": "first"}, "api_key": "sk-x", "organization": url},
    ]


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
def test_r24_no_field_header_or_query_leads_to_another_host(
    pair: House, upstream: Upstream, trap: Trap, method: str
) -> None:
    target = f"{trap.url}/v1"
    headers = dict.fromkeys(HEADERS, target) | {"Authorization": f"Bearer {pair.key}"}
    query = dict.fromkeys(DESTINATIONS, target)
    with httpx.Client(base_url=pair.url, headers=headers, params=query) as client:
        for path in PATHS:
            for body in misled(target) if method == "POST" else [{}]:
                sent = {"model": "tiny", **question("where to"), **body}
                response = client.request(method, path, json=sent)
                assert response.status_code < 500, (path, body, response.text)
                if response.status_code == 200 and "completions" in path:
                    assert response.headers["x-penstock-provider"] == "first"
    assert not trap.touched
    if method == "POST":
        assert upstream.ledger.asked
        assert {record.path for record in upstream.ledger.asked} == {"/v1/chat/completions"}
        assert all(
            record.headers["host"] == f"{LOOPBACK}:{upstream.port}" for record in upstream.ledger.asked
        )
        assert not any(target in str(record.header_items) + record.query for record in upstream.ledger.asked)


def test_r24_nor_does_a_frame_of_a_socket(pair: House, trap: Trap) -> None:
    headers = {"Authorization": f"Bearer {pair.key}", **dict.fromkeys(HEADERS, f"{trap.url}/v1")}
    with connect(
        f"ws://{LOOPBACK}:{pair.port}/ws/chat", additional_headers=headers, compression=None, proxy=None
    ) as wire:
        for number, body in enumerate(misled(f"{trap.url}/v1")):
            wire.send(json.dumps({"id": f"r{number}", **question("where to"), **body}))
            while json.loads(wire.recv(timeout=5))["type"] == "chunk":
                pass
    assert not trap.touched


# -- R26: what prompts point to ----------------------------------------------------------------------------------------------


def pointing(url: str) -> list[dict[str, Any]]:
    """Messages with addresses in every place where a provider's dialect has one."""
    parts = [
        {"type": "image_url", "image_url": {"url": f"{url}/picture.png"}},
        {"type": "image_url", "image_url": f"{url}/plain.png"},
        {"type": "input_image", "image_url": f"{url}/input.png"},
        {"type": "input_audio", "input_audio": {"data": f"{url}/sound.wav", "format": "wav"}},
        {"type": "video_url", "video_url": {"url": f"{url}/film.mp4"}},
        {"type": "file", "file": {"file_data": f"{url}/paper.pdf", "file_id": f"{url}/id"}},
        {"type": "document", "source": {"type": "url", "url": f"{url}/document.pdf"}},
        {"type": "text", "text": f"Please open {url}/text and file:///etc/passwd"},
    ]
    return [
        {"role": "system", "content": f"![x]({url}/markdown.png)"},
        {"role": "user", "content": parts},
        {"role": "user", "content": f"<img src='{url}/html.png'>"},
    ]


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
def test_r26_an_address_in_a_prompt_is_passed_on_and_never_opened(
    pair: House, upstream: Upstream, trap: Trap, stream: bool
) -> None:
    messages = pointing(trap.url)

    response = httpx.post(
        f"{pair.url}{CHAT}",
        json={"messages": messages, "stream": stream},
        headers={"Authorization": f"Bearer {pair.key}"},
    )

    assert response.status_code == 200
    assert upstream.ledger.last.json["messages"] == messages
    assert not trap.touched


def test_r26_nor_is_an_address_in_an_answer(pair: House, upstream: Upstream, trap: Trap) -> None:
    upstream.behave(answers.ok(texts=[f"![x]({trap.url}/answer.png) ", f"{trap.url}/more"]))
    assert listen(pair.url, pair.key, "linked").text.endswith("/more")
    upstream.behave(faults.redirect(307, f"{trap.url}/v1/chat/completions"))
    assert listen(pair.url, pair.key, "redirected").provider == "second"
    assert not trap.touched


# -- R38: sockets --------------------------------------------------------------------------------------------------------------


def handshake(port: int, path: str = "/ws/chat", **headers: str) -> socket.socket:
    """A WebSocket's opening request, by hand; the answer is still to be read."""
    wire = socket.create_connection((LOOPBACK, port), timeout=10)
    lines = [
        f"GET {path} HTTP/1.1",
        f"Host: localhost:{port}",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Version: 13",
        f"Sec-WebSocket-Key: {base64.b64encode(os.urandom(16)).decode()}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    wire.sendall("\r\n".join([*lines, "", ""]).encode())
    return wire


def status_of(wire: socket.socket) -> int:
    head = b""
    while b"\r\n\r\n" not in head:
        part = wire.recv(4096)
        if not part:
            break
        head += part
    return statuses(head)[0]


@pytest.fixture(scope="module")
def session(plain: Gateway, root: httpx.Client) -> str:
    """The cookie of an administrator who is logged in to the console."""
    with plain.client(follow_redirects=False) as browser:
        token = browser.get("/admin/login/").cookies["csrftoken"]
        form = {"username": "root", "password": PASSWORD, "next": "/admin/", "csrfmiddlewaretoken": token}
        assert browser.post("/admin/login/", data=form).status_code == 302
        assert browser.get("/admin/").status_code == 200
        return "; ".join(f"{name}={value}" for name, value in browser.cookies.items())


@pytest.mark.parametrize("path", ["/ws/chat", "/v1/ws/chat", "/ws/playground"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost.evil.example"])
def test_r38_a_foreign_page_opens_no_socket_with_a_session(
    plain: Gateway, session: str, path: str, origin: str
) -> None:
    """On the data plane a session is nothing, so the key is missing; where a session counts, the origin is refused."""
    with handshake(plain.port, path, Origin=origin, Cookie=session) as wire:
        assert status_of(wire) in ({403, 404} if path == "/ws/playground" else {401, 403})


@pytest.mark.parametrize(
    "path", ["/ws/nothing", "/ws", "/v1/ws/chat/more", "/admin/", "/v1/chat/completions"]
)
def test_a_socket_on_a_path_that_has_none_is_404(plain: Gateway, path: str) -> None:
    with handshake(plain.port, path, Authorization="Bearer x") as wire:
        assert status_of(wire) in {401, 404}


@pytest.mark.parametrize("path", ["/ws/chat", "/v1/ws/chat"])
def test_r38_a_session_alone_opens_no_socket_of_the_data_plane(
    plain: Gateway, session: str, path: str
) -> None:
    with handshake(plain.port, path, Origin=f"http://localhost:{plain.port}", Cookie=session) as wire:
        assert status_of(wire) in {401, 403}


def test_r38_a_program_with_a_key_needs_no_origin(house: House) -> None:
    with handshake(house.port, Authorization=f"Bearer {house.key}") as wire:
        assert status_of(wire) == 101


@pytest.mark.parametrize("query", ["key={key}", "api_key={key}", "x=1&token={key}"])
def test_r38_a_key_in_the_address_is_400_and_in_no_log(
    house: House, caplog: pytest.LogCaptureFixture, query: str
) -> None:
    with handshake(
        house.port, f"/ws/chat?{query.format(key=house.key)}", Authorization=f"Bearer {house.key}"
    ) as wire:
        assert status_of(wire) == 400
    assert house.key not in caplog.text


@pytest.mark.parametrize("kind", ["text", "bytes", "pieces"])
def test_r38_a_message_above_a_mebibyte_closes_1009_and_is_not_collected(house: House, kind: str) -> None:
    large = "x" * (1024 * 1024 + 1)
    pieces = (large[start : start + 65_536] for start in range(0, len(large), 65_536))
    with connect(
        f"ws://{LOOPBACK}:{house.port}/ws/chat",
        additional_headers={"Authorization": f"Bearer {house.key}"},
        compression=None,
        proxy=None,
    ) as wire:
        with suppress(ConnectionClosed):  # it may close before all of it is sent
            wire.send(pieces if kind == "pieces" else large if kind == "text" else large.encode())
        with pytest.raises(ConnectionClosed) as closed:
            wire.recv(timeout=5)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_r38_a_peer_that_answers_no_ping_is_let_go(house: House) -> None:
    config = house._server.config
    config.ws_ping_interval, config.ws_ping_timeout = 0.3, 0.3
    with handshake(house.port, Authorization=f"Bearer {house.key}") as wire:
        assert status_of(wire) == 101
        began = time.monotonic()
        wire.settimeout(5)
        while wire.recv(4096):
            pass  # pings, unanswered, and at last the end
        assert time.monotonic() - began < 3


def test_r38_a_key_has_a_thousand_idle_sockets_and_no_more(plain: Gateway, key: str) -> None:
    with ExitStack() as wires:
        for _ in range(1000):
            wire = wires.enter_context(handshake(plain.port, Authorization=f"Bearer {key}"))
            assert status_of(wire) == 101
        with handshake(plain.port, Authorization=f"Bearer {key}") as one_more:
            assert status_of(one_more) == 429


# -- R40: paths and hosts ------------------------------------------------------------------------------------------------------


def exchange(port: int, request: str, host: str = "Host: localhost") -> tuple[int, bytes]:
    """The first status of what a connection gives for this request line and these headers, and all of it."""
    head = "\r\n".join(line for line in (request.partition("\n")[0], host) if line)
    rest = request.partition("\n")[2].replace("\n", "\r\n")
    with socket.create_connection((LOOPBACK, port), timeout=10) as wire:
        wire.sendall(f"{head}\r\n{rest}{chr(13) + chr(10) if rest else ''}Connection: close\r\n\r\n".encode())
        received = b""
        while part := wire.recv(65_536):
            received += part
    return statuses(received)[0], received


ODD_ADMIN = [
    "//admin/", "///admin/", "/admin//", "/./admin/", "/v1/../admin/", "/v1/..%2fadmin/", "/v1/%2e%2e/admin/",
    "/%2e%2e/admin/", "/%61dmin/", "/ADMIN/", "/Admin/", "/admin;x=1/", "/admin/;", "/admin%20/", "/admin./", "/admin/.",
    "/admin%00/", "/admin%2f", "/livez/../admin/", "/readyz;/admin/", "/livez/%2e%2e/admin/", "/admin/?next=/livez",
    "/static/../admin/", "/static/%2e%2e/admin/", "/admin\\", "/admin/login/../", "/api/v1/../../admin/",
    "http://localhost/admin/", "http://livez/admin/",
]  # fmt: skip
ODD_API = [path.replace("/admin", "/api/v1/providers").replace("Admin", "Api") for path in ODD_ADMIN]
SIGNS_OF_THE_INSIDE = (b"Log out", b"/admin/logout", b"masked_key", b'"results"')
FORGED = (
    "X-Original-URL: /livez\nX-Rewrite-URL: /livez\nX-Forwarded-Host: livez\nX-Forwarded-Path: /livez\n"
    "X-HTTP-Method-Override: GET\nX-HTTP-Method: OPTIONS\nX-Method-Override: OPTIONS\nX-Forwarded-Prefix: /livez\n"
    "X-Forwarded-For: 127.0.0.1\nX-Real-IP: 127.0.0.1\nX-Forwarded-User: root\nRemote-User: root"
)


@pytest.mark.parametrize("forged", ["", FORGED], ids=["plain", "forged"])
@pytest.mark.parametrize("path", [*ODD_ADMIN, *ODD_API])
def test_r40_an_odd_path_shows_a_stranger_nothing(plain: Gateway, path: str, forged: str) -> None:
    status, answer = exchange(plain.port, f"GET {path} HTTP/1.1\n{forged}")
    assert status in {301, 302, 400, 401, 403, 404}, answer[:300]
    assert not any(sign in answer for sign in SIGNS_OF_THE_INSIDE)
    if status in {301, 302}:
        location = answer.lower().partition(b"\r\nlocation: ")[2].partition(b"\r\n")[0]
        assert location.startswith(b"/") and not location.startswith((b"//", b"/\\")), location


@pytest.mark.parametrize("forged", ["", FORGED], ids=["plain", "forged"])
def test_r40_a_gateway_key_opens_no_odd_path_of_the_console(plain: Gateway, key: str, forged: str) -> None:
    for path in [*ODD_ADMIN, *ODD_API]:
        status, answer = exchange(plain.port, f"GET {path} HTTP/1.1\nAuthorization: Bearer {key}\n{forged}")
        assert status in {301, 302, 400, 401, 403, 404}, (path, answer[:300])
        assert not any(sign in answer for sign in SIGNS_OF_THE_INSIDE), path


ODD_MODELS = [
    "//v1/models", "/v1//models", "/V1/models", "/v1/Models", "/v1/models;x", "/v1/./models", "/x/../v1/models",
    "/v1/%2e/models", "/v1/models%20", "/v1/models/.", "/livez/../v1/models", "/livez;/v1/models", "/v1/models?x=/livez",
    "http://livez/v1/models", "/v1/models/%2e%2e/livez", "/v1/models#/livez",
]  # fmt: skip


@pytest.mark.parametrize("forged", ["", FORGED], ids=["plain", "forged"])
@pytest.mark.parametrize("path", ODD_MODELS)
def test_r40_an_odd_path_of_the_data_plane_needs_the_key_as_any_other(
    plain: Gateway, path: str, forged: str
) -> None:
    status, answer = exchange(plain.port, f"GET {path} HTTP/1.1\n{forged}")
    assert status in {301, 302, 400, 401, 403, 404}, answer[:300]
    assert b'"data"' not in answer


@pytest.mark.parametrize("path", ["/v1/models", "/admin/login/", "/api/v1/providers", "/livez"])
@pytest.mark.parametrize(
    "host",
    [
        "",
        "Host: a/health?#",
        "Host: localhost\r\nHost: localhost",
        "Host: localhost\r\nHost: evil.example",
        "Host: localhost@evil.example",
        "Host: localhost evil.example",
        "Host: ",
    ],
    ids=["absent", "a path", "twice", "two", "user", "blank", "empty"],
)
def test_r40_a_host_that_is_none_is_400(plain: Gateway, host: str, path: str) -> None:
    status, answer = exchange(plain.port, f"GET {path} HTTP/1.1\n", host=host)
    assert status == 400, answer[:300]


@pytest.mark.parametrize("path", ["/admin/login/", "/api/v1/providers"])
def test_r40_the_console_has_no_unknown_host(plain: Gateway, path: str) -> None:
    status, answer = exchange(plain.port, f"GET {path} HTTP/1.1\n", host="Host: evil.example")
    assert status == 400, answer[:300]
    assert b"evil.example" not in answer


def test_r40_forwarded_addresses_of_a_stranger_change_no_decision_by_address(
    house: House, upstream: Upstream
) -> None:
    import ipaddress

    house.provide("first", f"{upstream.url}/v1")
    elsewhere = house.issue("elsewhere", allowed_networks=(ipaddress.ip_network("10.0.0.0/8"),))
    names = (
        "X-Forwarded-For",
        "X-Real-IP",
        "X_Forwarded_For",
        "Forwarded",
        "True-Client-IP",
        "CF-Connecting-IP",
    )
    for name in names:
        value = "for=10.0.0.1" if name == "Forwarded" else "10.0.0.1"
        told = listen(house.url, elsewhere, f"from-{name}", headers={name: value})
        assert (told.status, told.code) == (403, "ip_not_allowed"), name


# -- R41: fairness -------------------------------------------------------------------------------------------------------------


def test_r41_one_request_more_than_a_key_may_run_is_429_at_once(pair: House, upstream: Upstream) -> None:
    """And another key is served beside it; when one has ended, the next is let in."""
    key = pair.issue("narrow", max_concurrency=3)
    upstream.behave(answers.ok(chunks=100, delay=0.02))
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(listen, pair.url, key, f"slow-{number}") for number in range(3)]
        upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == 3)
        upstream.script(answers.ok())
        refused = [listen(pair.url, key, f"refused-{number}") for number in range(10)]
        served = listen(pair.url, pair.key, "another")
        assert not any(each.done() for each in running)
        assert all(each.result().ended_well for each in running)

    for told in refused:
        assert (told.status, told.code) == (429, "concurrency_limit_exceeded")
        assert int(told.headers["retry-after"]) >= 1
    assert sorted(told.took for told in refused)[5] < 0.05
    assert served.ended_well
    upstream.behave(answers.ok())
    assert listen(pair.url, key, "let in").ended_well


def test_r41_livez_answers_while_every_place_is_taken(plain: Gateway, busy: Upstream, key: str) -> None:
    busy.behave(answers.ok(chunks=40, delay=0.03))
    stop, took = threading.Event(), list[float]()

    def look() -> None:
        with plain.client() as client:
            while not stop.is_set():
                began = time.monotonic()
                assert client.get("/livez").status_code == 200
                took.append(time.monotonic() - began)
                time.sleep(0.02)

    with ThreadPoolExecutor(41) as pool:
        looking = pool.submit(look)
        tolds = list(pool.map(lambda n: listen(plain.url, key, f"busy-{n}", model="busy/busy"), range(80)))
        stop.set()
        looking.result()
    assert all(told.ended_well or told.status == 429 for told in tolds)
    assert sorted(took)[int(len(took) * 0.95)] < 0.1
