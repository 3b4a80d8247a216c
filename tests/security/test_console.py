"""The console as strangers find it behind https, and what is stored in it: never run, never followed, never a second line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.security.conftest import PASSWORD, make_root
from tests.support.api import V1
from tests.support.gateway import Gateway

pytestmark = pytest.mark.no_database

HOST = "gateway.example.org"
OVER_HTTPS = {"host": HOST, "x-forwarded-proto": "https"}
"""As the proxy in front passes a request on."""
PRODUCTION = {
    "PUBLIC_URL": f"https://{HOST}",
    "ALLOWED_HOSTS": HOST,
    "TRUSTED_PROXIES": "127.0.0.1/32",
    "DEBUG": "false",
}
REACHED = str(1234567 * 8)
"""What one of these would make, if anybody evaluated it."""
CONTROL = {'x"\n{"level":"error","message":"forged"}', "\x1b[31mred"}
SPELLS = (
    "{{1234567*8}}",
    "${1234567*8}",
    "#{1234567*8}",
    "<%= 1234567*8 %>",
    "{% debug %}",
    "%(asctime)s",
    "{0.__class__}",
    "__import__('os').system('id')",
    "os.environ/PENSTOCK_ENCRYPTION_KEY",
    "file:///etc/passwd",
    "env://SECRET_KEY",
    *CONTROL,
)
HIDDEN = (
    "/debug",
    "/__debug__/",
    "/silk/",
    "/.git/config",
    "/.env",
    "/static/../config/settings.py",
    "/static/%2e%2e/manage.py",
    "/static/..%2fmanage.py",
    "/admin/jsi18n/../../manage.py",
    "/docs",
    "/redoc",
    "/openapi.yaml",
)


@pytest.fixture(scope="module")
def gateway() -> Iterator[Gateway]:
    with Gateway(env=PRODUCTION) as running:
        yield running


@pytest.fixture(scope="module")
def browser(gateway: Gateway) -> Iterator[httpx.Client]:
    """The administrator's, as the proxy in front passes its requests on."""
    make_root(gateway)
    with gateway.client(headers=OVER_HTTPS) as client:
        client.get("/admin/login/")
        token = next(cookie.value for cookie in client.cookies.jar if cookie.name == "__Host-csrftoken")
        form = {"username": "root", "password": PASSWORD, "csrfmiddlewaretoken": token}
        headers = {"cookie": cookies(client), "referer": f"https://{HOST}/admin/login/"}
        answer = client.post("/admin/login/", data=form, headers=headers)
        assert answer.status_code == 302
        (session,) = (each for each in answer.headers.get_list("set-cookie") if "session=" in each)
        assert "httponly" in session.lower()
        client.headers["cookie"] = cookies(client)
        yield client


def cookies(client: httpx.Client) -> str:
    """What was set: over plain http on loopback, the client itself would not send back what is `Secure`."""
    return "; ".join(f"{cookie.name}={cookie.value}" for cookie in client.cookies.jar)


@pytest.mark.parametrize(
    "path",
    [
        "/admin/",
        "/admin/providers/server/",
        "/admin/login/",
        "/admin/nothing/",
        "/api/v1/servers",
        "/api/docs/",
    ],
)
def test_r43_every_page_has_the_headers_of_a_console(browser: httpx.Client, path: str) -> None:
    answer = browser.get(path)

    age = re.search(r"max-age=(\d+)", answer.headers["strict-transport-security"])
    assert age is not None and int(age[1]) >= 365 * 86400
    policy = answer.headers["content-security-policy"]
    for rule in ("object-src 'none'", "base-uri 'none'", "frame-ancestors 'none'"):
        assert rule in policy, policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] in {"same-origin", "no-referrer"}
    assert answer.headers["cross-origin-opener-policy"] == "same-origin"
    assert "no-store" in answer.headers["cache-control"]


def test_r43_cookies_belong_to_this_host_over_https_and_to_no_script(
    gateway: Gateway, browser: httpx.Client
) -> None:
    with gateway.client(headers=OVER_HTTPS) as client:
        set_cookies = client.get("/admin/login/").headers.get_list("set-cookie")
    assert set_cookies
    assert "__Host-session" in browser.headers["cookie"]
    for line in set_cookies:
        assert line.startswith("__Host-"), line
        words = {word.strip().lower() for word in line.split(";")[1:]}
        assert {"secure", "path=/"} <= words and any(word.startswith("samesite=") for word in words), line


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"DEBUG": "true", "HOST": "0.0.0.0"}, "DEBUG"),
        ({"SECRET_KEY": ""}, "SECRET_KEY"),
        ({"SECRET_KEY": "short"}, "SECRET_KEY"),
    ],
    ids=["debug pages for all", "no secret key", "a short secret key"],
)
def test_r43_it_does_not_start_unsafe(gateway: Gateway, change: dict[str, str], named: str) -> None:
    refused = gateway.run_manage("serve", env=change)

    assert refused.returncode != 0
    assert f"{named}: " in refused.stderr and "Traceback" not in refused.stderr


def test_r43_the_shipped_settings_pass_the_deployment_check(gateway: Gateway) -> None:
    assert gateway.run_manage("check", "--deploy", "--fail-level", "WARNING").returncode == 0


def test_r47_r52_what_is_stored_comes_back_as_it_was_written_and_never_makes_a_line_of_its_own(
    gateway: Gateway, browser: httpx.Client
) -> None:
    with gateway.client() as anybody:
        token = anybody.post(
            f"{V1}/auth/token", json={"username": "root", "password": PASSWORD}, headers=OVER_HTTPS
        )
    bearer = {"authorization": f"Bearer {token.json()['access']}"}
    refused = set()
    with gateway.client(headers={**OVER_HTTPS, **bearer}) as client:
        for spell in SPELLS:
            body = {
                "name": spell,
                "kind": "vllm",
                "base_url": "http://127.0.0.1:9",
                "metadata": {"note": spell},
            }
            made = client.post(f"{V1}/servers", json=body)
            if made.status_code == 400:
                # Refused as a whole is fine, as for control characters; half taken would not be.
                assert REACHED not in made.text
                refused.add(spell)
                continue
            assert made.status_code == 201, made.text
            row = client.get(f"{V1}/servers/{made.json()['id']}").json()
            assert row["name"] == spell and row["metadata"] == {"note": spell}
            page = browser.get(f"/admin/providers/server/{row['id']}/change/")
            assert page.status_code == 200 and REACHED not in page.text
            client.post(f"{V1}/servers/{row['id']}/test")
    assert refused <= CONTROL, refused
    for line in gateway.logs("web").splitlines():
        assert json.loads(line)["message"] != "forged", line
    assert "\x1b" not in gateway.logs("web")


@pytest.mark.parametrize("path", HIDDEN)
def test_r58_there_is_nothing_for_strangers_beside_the_product(gateway: Gateway, path: str) -> None:
    with gateway.client(headers=OVER_HTTPS) as client:
        answer = client.send(client.build_request("GET", gateway.url + path))
    assert answer.status_code in {401, 403, 404, 400}, (path, answer.status_code)
    assert "SECRET" not in answer.text and "INSTALLED_APPS" not in answer.text


def test_r58_the_schema_needs_a_login_liveness_tells_nothing_and_trace_is_refused(gateway: Gateway) -> None:
    with gateway.client(headers=OVER_HTTPS) as client:
        assert client.get("/api/schema/").status_code in {401, 403}
        assert client.get("/api/docs/").status_code in {401, 403, 302}
        alive = client.get("/livez")
        assert alive.status_code == 200 and len(alive.content) < 40
        assert not re.search(r"\d+\.\d+|postgres|sqlite|127\.0\.0\.1", alive.text)
        assert "server" not in alive.headers
        assert client.request("TRACE", "/admin/").status_code == 405
