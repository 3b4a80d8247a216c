"""What our own components do to callers when they are away, hang, come back, or change under running requests."""

from __future__ import annotations

import base64
import re
import secrets
import signal
import sqlite3
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support import answers, soak
from tests.support.gateway import Gateway
from tests.support.postgres import Postgres
from tests.support.rows import usage_rows
from tests.support.upstream import Upstream
from tests.support.valkey import Valkey

# Each of them says which database it is about.
pytestmark = [pytest.mark.timeout(240), pytest.mark.no_database]

HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}]}
CHAT = "/v1/chat/completions"
PASSWORD = "correct horse battery staple"


def wait(condition: Callable[[], Any], what: str, seconds: float = 10) -> float:
    """Until the condition holds; how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, what
        time.sleep(0.02)
    return time.monotonic() - began


def configuration_of(client: httpx.Client) -> float:
    """The number of the newest change that the gateway's web process knows."""
    (found,) = re.findall(r"^penstock_config_version ([\d.e+]+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found)


def well_formed_key() -> str:
    """A key with a right checksum that nobody issued."""
    from proxy.keys import checksum

    body = f"pen_live_{'Z' * 10}{'z' * 32}"
    return f"{body}_{checksum(body)}"


def records(gateway: Gateway) -> list[str]:
    """The request ids of all usage records; a doubled one is an error."""
    found = [str(row["request_id"]) for row in usage_rows(gateway)]
    assert len(set(found)) == len(found)
    return found


def administrator(gateway: Gateway) -> None:
    gateway.shell(
        "from audit.changes import changes\n"
        "from django.contrib.auth.models import User\n"
        "with changes(actor=None, via='command'):\n"
        f"    User.objects.create_superuser('owner', password={PASSWORD!r})\n"
    )


@contextmanager
def console(gateway: Gateway) -> Iterator[httpx.Client]:
    """A browser with the administrator's session, and the token of the API."""
    with gateway.client(timeout=10, follow_redirects=False) as client:
        # The test before may have just brought the database back.
        wait(lambda: client.get("/admin/login/").status_code == 200, "the console is away")
        page = client.get("/admin/login/")
        form = {
            "username": "owner",
            "password": PASSWORD,
            "next": "/admin/",
            "csrfmiddlewaretoken": page.cookies["csrftoken"],
        }
        assert client.post("/admin/login/", data=form).status_code == 302
        client.headers["x-csrftoken"] = client.cookies["csrftoken"]
        newest = client.get("/api/v1/audit?page_size=1").json()["results"][0]["id"]
        # While it reads the configuration anew, the gateway is patient with its database.
        wait(lambda: configuration_of(client) >= newest, "the login has not arrived")
        yield client


class Load:
    """Requests one after another on so many threads, each with a name; every answer kept."""

    def __init__(self, gateway: Gateway, key: str, *, threads: int = 2, pause: float = 0.02) -> None:
        self.seen: list[tuple[str, int]] = []
        self._gateway, self._key, self._pause = gateway, key, pause
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(f"{secrets.token_hex(4)}-{n}",), daemon=True)
            for n in range(threads)
        ]

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _run(self, name: str) -> None:
        with self._gateway.client(self._key) as client:
            number = 0
            while not self._stop.wait(self._pause):
                number += 1
                each = f"{name}-{number}"
                try:
                    status = client.post(CHAT, json=HELLO, headers={"x-request-id": each}).status_code
                except httpx.HTTPError as error:
                    status = 0
                    each = f"{each} {error!r}"
                self.seen.append((each, status))

    @property
    def failed(self) -> list[tuple[str, int]]:
        return [one for one in self.seen if one[1] != 200]

    @property
    def served(self) -> set[str]:
        return {name for name, status in self.seen if status == 200}


def timed(send: Callable[[], httpx.Response]) -> tuple[httpx.Response, float]:
    began = time.monotonic()
    return send(), time.monotonic() - began


def assert_unavailable_page(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.headers["content-type"].startswith("text/html")
    assert "retry-after" in response.headers
    assert "<h1>" in response.text and "Traceback" not in response.text and "psycopg" not in response.text


def assert_unavailable_json(response: httpx.Response) -> None:
    assert response.status_code == 503, response.text
    assert response.json()["error"]["code"] == "SERVICE_UNAVAILABLE"
    assert "retry-after" in response.headers


# -- F22 to F24: PostgreSQL ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    # What was committed must outlive an immediate restart here, unlike in other tests.
    with Postgres(options={"fsync": "on", "synchronous_commit": "on"}) as server:
        yield server


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream() as running:
        yield running


@pytest.fixture(scope="module")
def house(postgres: Postgres, upstream: Upstream) -> Iterator[tuple[Gateway, str]]:
    """A gateway with a drainer on a PostgreSQL server of its own, and a key."""
    with Gateway(database=postgres, programs=["drainer"]) as gateway:
        administrator(gateway)
        yield gateway, gateway.provide(f"{upstream.url}/v1", slug="first", api_key="sk-first-0123456789")


def stop(postgres: Postgres) -> None:
    postgres.process.stop(number=signal.SIGQUIT)


@pytest.mark.alone
@pytest.mark.parametrize(
    ("away", "back"), [(stop, Postgres.start), (Postgres.pause, Postgres.resume)], ids=["stopped", "frozen"]
)
def test_f22_without_its_database_the_gateway_serves_known_keys_and_loses_no_record(
    house: tuple[Gateway, str],
    postgres: Postgres,
    away: Callable[[Postgres], None],
    back: Callable[[Postgres], None],
) -> None:
    gateway, key = house
    with gateway.client() as client, console(gateway) as browser, Load(gateway, key) as load:
        try:
            away(postgres)
            for delay in (0, 0, 1, 2):
                time.sleep(delay)
                for path, check in (
                    ("/admin/", assert_unavailable_page),
                    ("/admin/providers/server/", assert_unavailable_page),
                    ("/api/v1/providers", assert_unavailable_json),
                ):
                    response, took = timed(lambda path=path: browser.get(path))  # type: ignore[misc]
                    check(response)
                    assert took < 2.0, (path, delay, took)
                response, took = timed(lambda: client.get("/livez"))
                assert response.status_code == 200 and took < 0.05
            wait(
                lambda: client.get("/readyz").json()["details"]["database"].startswith("silent for"),
                "readiness does not tell",
            )
            ready = client.get("/readyz")
            assert ready.status_code == 200 and ready.json()["status"] == "degraded"
            assert client.get("/api/v1/health").json()["status"] == "degraded"
            unknown = client.post(CHAT, json=HELLO, headers={"authorization": f"Bearer {well_formed_key()}"})
            assert unknown.status_code == 503, unknown.text
            assert unknown.headers["retry-after"]
            malformed = client.post(CHAT, json=HELLO, headers={"authorization": "Bearer pen_live_x"})
            assert malformed.status_code == 401
        finally:
            back(postgres)
        recovered = wait(lambda: browser.get("/admin/").status_code == 200, "the console stays away")
        assert recovered <= 5, recovered
        wait(lambda: client.get("/readyz").json()["details"]["database"] == "ok", "not ready again", 5)
    assert load.seen and not load.failed
    wait(lambda: load.served <= set(records(gateway)), gateway.logs("drainer")[-3000:], 20)
    assert "Traceback" not in gateway.logs("drainer")


def test_f22_the_drainer_stops_when_told_although_the_database_is_frozen(
    house: tuple[Gateway, str], postgres: Postgres
) -> None:
    gateway, key = house
    drainer = gateway.process("drainer")
    with gateway.client(key) as client:
        postgres.pause()
        try:
            assert client.post(CHAT, json=HELLO).status_code == 200
            time.sleep(1.5)  # it is in the middle of a question by now
            began = time.monotonic()
            drainer.send_signal(signal.SIGTERM)
            code = drainer.wait(12)
            took = time.monotonic() - began
        finally:
            postgres.resume()
            gateway.start("drainer")
    assert (code, took < 10) == (0, True), took


@pytest.mark.alone
def test_f23_an_immediate_restart_of_the_database_fails_no_request_of_an_application(
    house: tuple[Gateway, str], postgres: Postgres
) -> None:
    gateway, key = house
    with console(gateway) as browser, Load(gateway, key) as load:
        pages = []
        for _ in range(2):
            postgres.restart()
            for _ in range(10):
                pages.append(browser.get("/admin/").status_code)
                time.sleep(0.1)
        wait(lambda: browser.get("/admin/").status_code == 200, "the console stays away", 5)
    assert load.seen and not load.failed
    assert set(pages) <= {200, 503}
    # One failure for each pooled connection that was lost, and there are at least two in each pool.
    assert pages.count(503) <= 4, pages
    wait(lambda: load.served <= set(records(gateway)), gateway.logs("drainer")[-3000:], 20)


def test_f24_a_database_that_became_read_only_refuses_changes_clearly_and_is_found_again(
    house: tuple[Gateway, str], postgres: Postgres
) -> None:
    gateway, key = house
    with gateway.client(key) as client, console(gateway) as browser, Load(gateway, key) as load:
        row = browser.get("/api/v1/providers?search=first").json()["results"][0]
        path = f"/api/v1/providers/{row['id']}"
        assert browser.patch(path, json={"priority": 7}).status_code == 200
        try:
            postgres.execute("ALTER SYSTEM SET default_transaction_read_only = on")
            postgres.execute("SELECT pg_reload_conf()")
            wait(lambda: browser.patch(path, json={"priority": 8}).status_code == 503, "it still writes")
            assert_unavailable_json(browser.patch(path, json={"priority": 8}))
            page = browser.post(f"/admin/providers/server/{row['id']}/change/", data={"name": "x"})
            assert page.status_code in {200, 503} and "Traceback" not in page.text
            assert browser.get(path).json()["priority"] == 7
            wait(
                lambda: "read-only" in client.get("/readyz").json()["details"]["database"],
                "readiness does not tell",
            )
            assert client.get("/readyz").status_code == 200
            time.sleep(2)
        finally:
            postgres.execute("ALTER SYSTEM RESET default_transaction_read_only")
            postgres.execute("SELECT pg_reload_conf()")
        took = wait(lambda: browser.patch(path, json={"priority": 9}).status_code == 200, "still refused")
        assert took <= 10
        wait(lambda: client.get("/readyz").json()["details"]["database"] == "ok", "not ready again")
    assert load.seen and not load.failed
    wait(lambda: load.served <= set(records(gateway)), gateway.logs("drainer")[-3000:], 20)


# -- F27: SQLite -----------------------------------------------------------------------------------------------------

BUSY_SECONDS = 8


def text_of_stream(gateway: Gateway, key: str) -> str:
    with gateway.client(key) as client:
        return stream(client)


def stream(client: httpx.Client) -> str:
    with client.stream("POST", CHAT, json={**HELLO, "stream": True}) as response:
        return response.read().decode()


def assert_never_locked(*, streams: int, seconds: float) -> None:
    """So many streams at a time and an administrator who saves without a pause: all are served, recorded, and nothing is locked."""
    with (
        Upstream(answers.ok(chunks=20, delay=0.1)) as upstream,
        Gateway(database="sqlite", programs=["drainer"], env={"RATE_LIMIT_REQUESTS": "1000000"}) as gateway,
        ThreadPoolExecutor(streams) as pool,
    ):
        administrator(gateway)
        key = gateway.provide(f"{upstream.url}/v1", slug="first")

        def work() -> list[bool]:
            whole = []
            with gateway.client(key) as client:
                while time.monotonic() < until:
                    whole.append("[DONE]" in stream(client))
            return whole

        with console(gateway) as browser:
            until = time.monotonic() + seconds
            running = [pool.submit(work) for _ in range(streams)]
            row = browser.get("/api/v1/providers?search=first").json()["results"][0]
            edits: list[int] = []
            while time.monotonic() < until:
                answer = browser.patch(f"/api/v1/providers/{row['id']}", json={"priority": len(edits) + 1})
                edits.append(answer.status_code)
            whole = [each for one in running for each in one.result(60)]
        assert edits and set(edits) == {200}
        assert len(whole) >= streams and all(whole)
        wait(lambda: len(usage_rows(gateway)) == len(whole), "usage records were lost", 20)
        locked = gateway.logs().count("database is locked")
        soak.say(seconds=seconds, streams=len(whole), edits=len(edits), records=len(whole), locked=locked)
        assert not locked


def test_f27_a_hundred_streams_and_edits_at_once_never_find_sqlite_locked() -> None:
    assert_never_locked(streams=100, seconds=BUSY_SECONDS)


@pytest.mark.soak
@pytest.mark.timeout(soak.SECONDS + 300)
def test_f27_two_hundred_streams_and_edits_for_minutes_never_find_sqlite_locked() -> None:
    assert_never_locked(streams=200, seconds=soak.SECONDS)


def assert_whole_after_kills(*, kills: int, streams: int) -> None:
    """Everything is killed under load, again and again; whatever was served by then is there, once."""
    with (
        Upstream() as upstream,
        Gateway(database="sqlite", programs=["drainer"]) as gateway,
    ):
        key = gateway.provide(f"{upstream.url}/v1", slug="first")
        served: set[str] = set()
        for number in range(kills):
            with Load(gateway, key, threads=streams, pause=0) as load:
                # The kill is to meet other moments each time, without being luck.
                time.sleep(0.8 + 0.3 * (number % 4))
                gateway.kill9("drainer")
                gateway.kill9("web")
            served |= load.served
            gateway.start()
            (file,) = gateway.data_dir.glob("*.sqlite3")
            with sqlite3.connect(file) as database:
                assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert served
        wait(lambda: served <= set(records(gateway)), "usage records were lost", 20)
        soak.say(kills=kills, served=len(served))


def test_f27_kill_9_leaves_sqlite_whole() -> None:
    assert_whole_after_kills(kills=4, streams=4)


@pytest.mark.soak
@pytest.mark.timeout(soak.SECONDS * 10 + 300)
def test_f27_kill_9_a_hundred_times_leaves_sqlite_whole() -> None:
    assert_whole_after_kills(kills=max(1, round(soak.SECONDS / 3)), streams=16)


# -- F36 and F38: secrets that change --------------------------------------------------------------------------------


def test_f36_a_provider_key_replaced_while_streaming_ends_no_stream_and_is_used_within_two_seconds(
    house: tuple[Gateway, str], upstream: Upstream
) -> None:
    gateway, key = house
    new = f"sk-{secrets.token_hex(12)}"
    upstream.script(answers.ok(chunks=60, delay=0.05))
    upstream.ledger.clear()
    with console(gateway) as browser, gateway.client(key) as client, ThreadPoolExecutor(1) as pool:
        running = pool.submit(text_of_stream, gateway, key)
        upstream.ledger.wait_for(lambda ledger: ledger.asked)
        old = upstream.ledger.asked[0].headers["authorization"]
        row = browser.get("/api/v1/providers?search=first").json()["results"][0]
        assert browser.patch(f"/api/v1/providers/{row['id']}", json={"api_key": new}).status_code == 200

        def uses_the_new_one() -> bool:
            assert client.post(CHAT, json=HELLO).status_code == 200
            return upstream.ledger.asked[-1].headers["authorization"] == f"Bearer {new}"

        assert wait(uses_the_new_one, "the old key is still used") <= 2
        assert not running.done()
        assert "[DONE]" in running.result(20)
    assert old != f"Bearer {new}"
    assert {one.headers["authorization"] for one in upstream.ledger.asked} == {old, f"Bearer {new}"}


def test_f38_a_replaced_encryption_key_file_does_not_touch_what_runs_and_stops_the_next_start(
    tmp_path: Path,
) -> None:
    file = tmp_path / "encryption-key"
    file.touch(mode=0o600)
    good = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    file.write_text(good)
    with (
        Upstream() as upstream,
        Gateway(
            database="sqlite", env={"PENSTOCK_ENCRYPTION_KEY": "", "PENSTOCK_ENCRYPTION_KEY_FILE": str(file)}
        ) as gateway,
    ):
        key = gateway.provide(f"{upstream.url}/v1", api_key="sk-sealed-0123456789")
        file.write_text(base64.urlsafe_b64encode(secrets.token_bytes(32)).decode())
        with gateway.client(key) as client:
            assert client.post(CHAT, json=HELLO).status_code == 200
        gateway.kill9()
        refused = gateway.run_manage("serve")
        assert refused.returncode != 0
        said = refused.stderr.strip().splitlines()
        assert len(said) == 1 and "PENSTOCK_ENCRYPTION_KEY" in said[0]
        file.write_text(good)
        gateway.start()
        with gateway.client(key) as client:
            assert client.post(CHAT, json=HELLO).status_code == 200


# -- F19 and F46 -----------------------------------------------------------------------------------------------------


def test_f19_the_gateway_starts_and_serves_while_redis_is_absent() -> None:
    valkey = Valkey()
    valkey.kill()
    try:
        with Upstream() as upstream, Gateway(redis=valkey) as gateway:
            key = gateway.provide(f"{upstream.url}/v1", limits={"requests_per_minute": 100})
            with gateway.client(key) as client:
                answered = [timed(lambda: client.post(CHAT, json=HELLO)) for _ in range(5)]
                assert {response.status_code for response, _ in answered} == {200}
                assert statistics.median(took for _, took in answered) < 0.5
                ready = client.get("/readyz")
                assert ready.status_code == 200 and "away" in ready.json()["details"]["redis"]
                valkey.start()
                wait(lambda: client.get("/readyz").json()["details"]["redis"] == "ok", "Redis is not found")
    finally:
        valkey.stop()


def test_f46_probes_of_the_gateway_need_no_login_and_are_never_throttled() -> None:
    with (
        Gateway(database="sqlite", env={"RATE_LIMIT_REQUESTS": "5"}) as gateway,
        gateway.client() as client,
    ):
        for path in ("/livez", "/readyz"):
            answers_seen = [timed(lambda path=path: client.get(path)) for _ in range(300)]  # type: ignore[misc]
            assert {response.status_code for response, _ in answers_seen} == {200}
            assert sorted(took for _, took in answers_seen)[150] < 0.05
        statuses = {client.get("/api/v1/providers").status_code for _ in range(20)}
        assert statuses == {401, 429}  # the throttle is on, for others
        assert client.get("/livez", headers={"authorization": "Bearer nonsense"}).status_code == 200
