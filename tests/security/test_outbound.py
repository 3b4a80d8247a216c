"""Where the product connects to, seen from inside each of its processes: R19 to R23 and R27, past the forms as well."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.security.conftest import Witness, log_in
from tests.support import faults
from tests.support.gateway import Gateway
from tests.support.upstream import Trap, Upstream
from tests.support.valkey import Valkey

pytestmark = pytest.mark.no_database

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
FORBIDDEN = [
    "http://169.254.169.254/v1",
    "http://169.254.170.2/v1",
    "http://100.100.100.200/v1",
    "http://168.63.129.16/v1",
    "http://192.0.0.192/v1",
    "http://0.0.0.0:{port}/v1",
    "http://0:{port}/v1",
    "http://2852039166/v1",
    "http://0xa9fea9fe/v1",
    "http://0251.0376.0251.0376/v1",
    "http://169.254.43518/v1",
    "http://169.254.169.254./v1",
    "http://[::ffff:169.254.169.254]/v1",
    "http://[64:ff9b::a9fe:a9fe]/v1",
    "http://[2002:a9fe:a9fe::]/v1",
    "http://[::a9fe:a9fe]/v1",
    "http://[fe80::1%25eth0]/v1",
    "http://[fd00:ec2::254]/v1",
    "http://[::]:{port}/v1",
    "http://224.0.0.1/v1",
    "http://255.255.255.255/v1",
    "http://①⑥⑨。②⑤④。①⑥⑨。②⑤④/v1",
    "http://ok@169.254.169.254/v1",
    "http://metadata.google.internal/v1",
    "http://metadata/v1",
    "http://METADATA.google.internal./v1",
    "http://127.0.0.1:{own}/v1",
    "http://localhost:{own}/v1",
]
SPELLINGS = ["http://127.1/v1", "http://2130706433/v1", "http://0x7f000001/v1", "http://0177.0.0.1/v1"]
"""Of an address that is allowed; refused when saved, since nobody means to write it so."""
NO_HTTP = [
    "file:///etc/passwd",
    "gopher://127.0.0.1/",
    "unix:///run/x.sock",
    "ftp://127.0.0.1/",
    "//127.0.0.1/v1",
]


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    with Trap() as running:
        yield running


@pytest.fixture(scope="module")
def gateway(witness: Witness) -> Iterator[Gateway]:
    env = {**witness.env, "HEALTH_CHECK_INTERVAL_SECONDS": "1"}
    with Valkey() as valkey, Gateway(redis=valkey, programs=["worker", "beat"], env=env) as running:
        yield running


@pytest.fixture(scope="module")
def root(gateway: Gateway) -> Iterator[httpx.Client]:
    with log_in(gateway) as client:
        yield client


def urls(gateway: Gateway, trap: Trap) -> list[str]:
    return [url.format(port=trap.port, own=gateway.port) for url in FORBIDDEN]


def test_r19_r20_r22_what_may_not_be_dialled_cannot_be_saved_or_tried(
    gateway: Gateway, root: httpx.Client, trap: Trap
) -> None:
    for url in [*urls(gateway, trap), *SPELLINGS, *NO_HTTP]:
        body = {"name": "bad", "kind": "openai-compatible", "base_url": url}
        saved = root.post("/api/v1/servers", json=body)
        assert saved.status_code == 400, url
        assert [*saved.json()["error"]["details"]] == ["base_url"], url
        tried = root.post("/api/v1/providers/test-direct", json=body)
        assert tried.status_code == 400 or tried.json()["status"] in {"error", "unreachable"}, url
    assert not trap.touched


def past_the_forms(gateway: Gateway, rows: dict[str, str], headers: dict[str, object] | None = None) -> str:
    """Providers written into the database without any check, each with the model `m`; a new gateway key."""
    code = (
        "import json\n"
        "from audit.changes import changes\n"
        "from providers.models import Provider, UpstreamModel\n"
        "from proxy.keys import give_secret\n"
        "from proxy.models import GatewayKey\n"
        f"rows = json.loads({json.dumps(json.dumps(rows))})\n"
        f"headers = json.loads({json.dumps(json.dumps(headers or {}))})\n"
        "with changes(actor=None, via='system'):\n"
        "    for slug, url in rows.items():\n"
        "        made = Provider.objects.create(slug=slug, name=slug, base_url='http://127.0.0.1:9/v1', use_for_chat=True)\n"
        "        UpstreamModel.objects.create(provider=made, name='m', purposes=['chat'])\n"
        "        Provider.objects.filter(pk=made.pk).update(base_url=url, custom_headers=headers.get(slug, {}))\n"
        "    key = GatewayKey(name='key of ' + slug); whole = give_secret(key); key.save()\n"
        "print(whole)\n"
    )
    key = gateway.shell(code).splitlines()[-1]
    gateway.wait_for_key(key)
    return key


def wait_for_probes(root: httpx.Client, slugs: set[str], seconds: float = 40.0) -> dict[str, str]:
    """The status of each of these servers once the worker has probed all of them."""
    deadline = time.monotonic() + seconds
    while True:
        rows = root.get("/api/v1/servers?page_size=200").json()["results"]
        seen = {
            row["slug"]: row["status"] for row in rows if row["slug"] in slugs and row["last_health_check"]
        }
        if seen.keys() == slugs:
            return seen
        assert time.monotonic() < deadline, slugs - seen.keys()
        time.sleep(0.1)


def test_r19_r20_r22_a_row_written_past_the_forms_is_never_dialled(
    gateway: Gateway, root: httpx.Client, trap: Trap, witness: Witness
) -> None:
    """By a caller's request, by the test button, and by the worker's probe; while a well row is dialled by all three."""
    with Upstream() as well:
        rows = {f"past-{n}": url for n, url in enumerate(urls(gateway, trap))}
        key = past_the_forms(gateway, {**rows, "well": f"{well.url}/v1"})
        with gateway.client(key) as client:
            for slug, url in rows.items():
                for stream in (False, True):
                    answer = client.post(
                        "/v1/chat/completions", json={**HELLO, "model": f"{slug}/m", "stream": stream}
                    )
                    assert answer.status_code == 502, (url, answer.text)
            good = client.post("/v1/chat/completions", json={**HELLO, "model": "well/m"})
            assert good.status_code == 200
        found = {
            row["slug"]: row["id"] for row in root.get("/api/v1/servers?page_size=200").json()["results"]
        }
        for slug, url in rows.items():
            tried = root.post(f"/api/v1/servers/{found[slug]}/test").json()
            assert tried["status"] in {"error", "unreachable"}, (url, tried)
        verdicts = wait_for_probes(root, {*rows, "well"})
        assert verdicts.pop("well") == "online"
        assert set(verdicts.values()) <= {"error", "unreachable"}
    assert not trap.touched
    dialled = {address for address in witness.connections() if address != ("127.0.0.1", 9)}
    assert ("127.0.0.1", well.port) in dialled
    assert all(host == "127.0.0.1" and port != gateway.port for host, port in dialled), dialled


def test_r21_a_name_that_turns_or_is_mixed_leads_nowhere(
    gateway: Gateway, root: httpx.Client, witness: Witness
) -> None:
    with Upstream() as upstream:
        witness.know(
            turning_example=[["127.0.0.1"], ["169.254.169.254"]],
            mixed_example=[["127.0.0.1", "169.254.169.254"]],
            late_example=[["169.254.169.254", "127.0.0.1"]],
        )
        rows = {name: f"http://{name}.example:{upstream.port}/v1" for name in ("turning", "mixed", "late")}
        for name, url in rows.items():
            body = {"name": name, "kind": "openai-compatible", "base_url": url, "models": ["m"]}
            assert root.post("/api/v1/servers", json={**body, "slug": name}).status_code == 201
        key = past_the_forms(gateway, {"one-more": f"{upstream.url}/v1"})
        with gateway.client(key) as client:
            for _ in range(50):
                for name in ("mixed", "late"):
                    answer = client.post("/v1/chat/completions", json={**HELLO, "model": f"{name}/m"})
                    assert answer.json()["error"]["code"] == "destination_not_allowed"
            upstream.behave(faults.close_after_answer(say_so=True))
            codes = [
                client.post("/v1/chat/completions", json={**HELLO, "model": "turning/m"}).status_code
                for _ in range(5)
            ]
        assert codes[0] in {200, 502}
        verdicts = wait_for_probes(root, {*rows})
        assert {verdicts["mixed"], verdicts["late"]} == {"error"}
    assert not [host for host, _ in witness.connections() if host.startswith("169.")]


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_r23_no_redirect_is_followed_by_request_test_or_probe(
    gateway: Gateway, root: httpx.Client, trap: Trap, code: int
) -> None:
    with Upstream() as upstream:
        for path in ("/models", "/completions", "/v1", "/health"):
            upstream.on(path, faults.redirect(code, f"{trap.url}/steal?key=secret-in-the-query"))
        slug = f"moved-{code}"
        key = past_the_forms(gateway, {slug: f"{upstream.url}/v1"})
        with gateway.client(key) as client:
            answer = client.post("/v1/chat/completions", json={**HELLO, "model": f"{slug}/m"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upstream_redirect")
        rows = root.get("/api/v1/servers?page_size=200").json()["results"]
        number = next(row["id"] for row in rows if row["slug"] == slug)
        assert root.post(f"/api/v1/servers/{number}/test").json()["status"] == "degraded"
        assert wait_for_probes(root, {slug}) == {slug: "degraded"}
    assert not trap.touched
    assert "/steal" in gateway.logs("web")
    assert "secret-in-the-query" not in gateway.logs()


def test_r27_one_nonsense_row_is_502_and_keeps_no_change_from_anybody(gateway: Gateway) -> None:
    with Upstream() as upstream:
        odd: dict[str, object] = {
            "odd-list": [1, 2],
            "odd-text": "x",
            "odd-number": {"A": 1},
            "odd-host": {"Host": "evil"},
            "odd-split": {"X-A": "a\r\nX-B: b"},
        }
        rows = dict.fromkeys(odd, f"{upstream.url}/v1")
        key = past_the_forms(gateway, {**rows, "odd-url": "http://[", "odd-port": "http://x:99999/v1"}, odd)
        with gateway.client(key) as client:
            for slug in odd:
                answer = client.post("/v1/chat/completions", json={**HELLO, "model": f"{slug}/m"})
                assert answer.status_code == 502, (slug, answer.text)
            for slug in ("odd-url", "odd-port"):
                answer = client.post("/v1/chat/completions", json={**HELLO, "model": f"{slug}/m"})
                assert answer.status_code in {404, 502}, answer.text
        assert not upstream.ledger.asked
