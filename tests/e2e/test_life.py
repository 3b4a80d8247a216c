"""What happens to running requests when processes die, stop, or lose what they depend on."""

from __future__ import annotations

import base64
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import quote

import httpx
import pytest

from tests.support import answers
from tests.support.gateway import Gateway
from tests.support.llama import Llama
from tests.support.rows import usage_rows
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}


def statuses(gateway: Gateway) -> dict[str, str]:
    """The status of every usage record, by request id; a doubled one is an error."""
    rows = usage_rows(gateway)
    found = {row["request_id"]: str(row["status"]) for row in rows}
    assert len(found) == len(rows)
    return found


def wait(condition: Any, what: str, seconds: float = 20) -> Any:
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
    return result


def stream(gateway: Gateway, key: str, name: str, **more: Any) -> str:
    """One streamed request; all of its text, as far as it came."""
    text = ""
    try:
        with (
            gateway.client(key) as client,
            client.stream(
                "POST",
                "/v1/chat/completions",
                json={**HELLO, "stream": True, **more},
                headers={"x-request-id": name},
            ) as response,
        ):
            for part in response.iter_text():
                text += part
    except httpx.HTTPError:
        pass
    return text


@pytest.mark.timeout(300)
def test_f32_after_kill_9_under_twenty_streams_every_request_has_exactly_one_record() -> None:
    rounds, at_once = 4, 20  # the long form, with a hundred kills, is among the runs of test_ledger
    with Upstream(answers.ok(chunks=60, delay=0.02)) as upstream, Gateway(programs=["drainer"]) as gateway:
        key = gateway.provide(f"{upstream.url}/v1", slug="slow", active=True)
        texts: dict[str, str] = {}

        def one(name: str) -> None:
            texts[name] = stream(gateway, key, name)

        for number in range(rounds):
            upstream.ledger.clear()
            with ThreadPoolExecutor(at_once) as pool:
                for each in range(at_once):
                    pool.submit(one, f"kill-{number}-{each}")
                upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == at_once, timeout=20)
                time.sleep(0.36 * number)
                gateway.kill9()
            gateway.start()

        wait(lambda: len(statuses(gateway)) == rounds * at_once, "records are missing", 60)
        found = statuses(gateway)
        for name, text in texts.items():
            if "[DONE]" in text:
                assert found[name] == "success", (name, found[name])
            else:
                assert found[name] in {"interrupted", "success"}
        assert "interrupted" in found.values()


def test_f33_sigterm_lets_running_streams_finish_and_exits_with_0() -> None:
    with Upstream(answers.ok(chunks=100, delay=0.04)) as upstream, Gateway(programs=["drainer"]) as gateway:
        key = gateway.provide(f"{upstream.url}/v1")
        with ThreadPoolExecutor(5) as pool:
            running = [pool.submit(stream, gateway, key, f"drain-{n}") for n in range(5)]
            upstream.ledger.wait_for(lambda ledger: len(ledger.asked) == 5)
            code = gateway.process().stop(timeout=45)
            texts = [each.result() for each in running]
        assert code == 0
        assert all("[DONE]" in text for text in texts)
        wait(lambda: list(statuses(gateway).values()) == ["success"] * 5, "records are missing")


def test_f19_without_redis_requests_are_served_and_readiness_says_so() -> None:
    with Upstream() as upstream, Valkey() as valkey, Gateway(redis=valkey) as gateway:
        key = gateway.provide(f"{upstream.url}/v1", limits={"requests_per_minute": 1000})
        with gateway.client(key) as client:
            assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
            valkey.pause()
            took = []
            for _ in range(12):
                began = time.monotonic()
                assert client.post("/v1/chat/completions", json=HELLO).status_code == 200
                took.append(time.monotonic() - began)
            assert max(took) < 1
            wait(
                lambda: "away" in client.get("/readyz").json()["details"]["redis"],
                "readiness does not tell",
                10,
            )
            valkey.resume()
            wait(
                lambda: client.get("/readyz").json()["details"]["redis"] == "ok",
                "Redis is not found again",
                15,
            )


def test_f39_edits_under_load_reach_requests_and_fail_none() -> None:
    with Upstream() as first, Upstream() as second, Gateway() as gateway:
        key = gateway.provide(f"{first.url}/v1", slug="first")
        stop = threading.Event()
        seen: list[httpx.Response] = []

        def load() -> None:
            with gateway.client(key) as client:
                while not stop.is_set():
                    seen.append(client.post("/v1/chat/completions", json=HELLO))

        worker = threading.Thread(target=load)
        worker.start()
        gateway.shell(
            "from audit.changes import changes\n"
            "from providers.models import Provider\n"
            "from django.db import connection\n"
            "for n in range(40):\n"
            "    with changes(actor=None, via='command'):\n"
            "        row = Provider.objects.get(slug='first'); row.priority = n; row.save()\n"
        )
        gateway.shell(
            "from audit.changes import changes\n"
            "from providers.models import Provider\n"
            "with changes(actor=None, via='command'):\n"
            f"    row = Provider.objects.get(slug='first'); row.base_url = '{second.url}/v1'; row.save()\n"
        )
        wait(lambda: second.ledger.asked, "the new address is never used", 5)
        stop.set()
        worker.join()
        assert {response.status_code for response in seen} == {200}
        versions = [int(response.headers["x-penstock-config"]) for response in seen]
        assert versions == sorted(versions) and versions[-1] - versions[0] >= 40


@pytest.mark.timeout(180)
def test_a_server_that_dies_is_down_soon_the_fallback_serves_and_it_comes_back() -> None:
    interval, threshold, timeout = 2, 2, 1
    env = {
        "HEALTH_CHECK_INTERVAL_SECONDS": str(interval),
        "HEALTH_CHECK_FAILURE_THRESHOLD": str(threshold),
        "HEALTH_CHECK_TIMEOUT_SECONDS": str(timeout),
    }
    with (
        Llama() as llama,
        Upstream() as fallback,
        Valkey() as valkey,
        Gateway(redis=valkey, env=env, programs=["worker", "beat"]) as gateway,
    ):
        gateway.provide(llama.url, slug="local", kind="llamacpp", key=False)
        key = gateway.provide(f"{fallback.url}/v1", slug="fallback", models=["big"])

        def verdict() -> str:
            code = (
                "from providers.models import ProviderHealth; "
                "h = ProviderHealth.objects.filter(provider__slug='local').first(); "
                "print(h.health_status if h else 'unknown')"
            )
            return gateway.shell(code).strip().splitlines()[-1]

        def answered_by() -> str:
            with gateway.client(key) as client:
                response = client.post("/v1/chat/completions", json={**HELLO, "max_tokens": 3})
            assert response.status_code == 200, response.text
            return str(response.headers["x-penstock-provider"])

        wait(lambda: verdict() == "healthy", gateway.logs()[-3000:])
        assert answered_by() == "local"

        llama.kill()
        killed = time.monotonic()
        assert answered_by() == "fallback"
        # Asking takes its own time on a busy machine.
        wait(
            lambda: verdict() == "down",
            gateway.logs()[-3000:],
            (threshold + 1) * interval * 1.2 + timeout + 5,
        )
        assert answered_by() == "fallback"
        assert time.monotonic() - killed < 30

        llama.start()
        wait(lambda: verdict() == "healthy", gateway.logs()[-3000:], 30)
        wait(lambda: answered_by() == "local", "the server is not used again", 60)


def forms(secret: str) -> list[bytes]:
    """A secret in the forms it could leak in."""
    raw = secret.encode()
    return [
        raw,
        base64.b64encode(raw).rstrip(b"=")[:-2],
        raw.hex().encode(),
        quote(secret, safe="").encode(),
        raw[::-1],
    ]


def test_r01_no_secret_is_anywhere_but_where_it_is_used() -> None:
    provider_key = "sk-CANARY-0f9e8d7c6b5a4f3e2d1c"
    with (
        Upstream() as upstream,
        Valkey() as valkey,
        Gateway(redis=valkey, programs=["worker", "beat", "drainer"], env={"LOG_LEVEL": "DEBUG"}) as gateway,
    ):
        upstream.script(answers.ok(), answers.unauthorized(), answers.status(500))
        key = gateway.provide(f"{upstream.url}/v1", api_key=provider_key, limits={"requests_per_minute": 100})
        answers_seen = []
        with gateway.client(key) as client:
            for body in (HELLO, {**HELLO, "stream": True}, HELLO, {**HELLO, "messages": []}):
                answers_seen.append(client.post("/v1/chat/completions", json=body).content)
            answers_seen.append(client.get("/v1/models").content)
            answers_seen.append(client.get("/metrics").content)
        assert upstream.ledger.asked[0].headers["authorization"] == f"Bearer {provider_key}"
        wait(lambda: len(usage_rows(gateway)) >= 3, "records are missing")
        dump = gateway.manage("dumpdata", "--natural-foreign").encode()
        files = b"".join(path.read_bytes() for path in gateway.data_dir.rglob("*") if path.is_file())
        places = {
            "answers": b"".join(answers_seen),
            "logs": gateway.logs().encode(),
            "dump": dump,
            "files": files,
        }
        for place, content in places.items():
            for secret in (provider_key, key, key[19:51], gateway.env["PENSTOCK_ENCRYPTION_KEY"]):
                assert not any(form in content for form in forms(secret)), f"a secret is in the {place}"
