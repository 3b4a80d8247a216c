"""Single sign-on against a real OpenID provider on loopback, over real HTTP."""

from __future__ import annotations

import html
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, ClassVar
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from config import sso
from config.env import ROLES
from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.processes import Process

pytestmark = pytest.mark.no_database
BUTTON = "Log in with single sign-on"


class Provider:
    """An identity provider whose users a test makes and changes."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.client = httpx.Client(base_url=self.url, trust_env=False)

    def answers(self) -> bool:
        try:
            return self.client.get("/.well-known/openid-configuration").status_code == 200
        except httpx.HTTPError:
            return False

    def put(self, sub: str, **claims: Any) -> None:
        answer = self.client.put(f"/users/{sub}", json={"preferred_username": sub, **claims})
        assert answer.status_code == 204, answer.text

    def consent(self, address: str, sub: str) -> str:
        """Log in as `sub` on the provider's page; the address it sends the browser to."""
        answer = self.client.post(address, data={"sub": sub})
        assert answer.status_code == 302, answer.text
        return str(answer.headers["location"])


@pytest.fixture(scope="module")
def provider() -> Iterator[Provider]:
    port = free_port()
    # A process of its own: its libraries warn of each other, and warnings are errors here.
    command = [sys.executable, "-m", "oidc_provider_mock", "--port", str(port)]
    process, made = (
        Process(command, name="oidc", env={**os.environ, "PYTHONWARNINGS": "ignore"}),
        Provider(port),
    )
    try:
        process.wait_until(made.answers, timeout=60, every=0.1)
        yield made
    finally:
        made.client.close()
        process.kill()


@pytest.fixture(autouse=True)
def _close_browsers() -> Iterator[None]:
    yield
    while Browser.opened:
        Browser.opened.pop().close()


def settings_for(provider: Provider) -> dict[str, str]:
    return {
        "OIDC_ISSUER": provider.url,
        "OIDC_CLIENT_ID": "penstock",
        "OIDC_CLIENT_SECRET": "a client secret",
        "OIDC_ROLE_CLAIM": "realm_access.roles",
        "OIDC_ROLE_MAP": "llm-admins=administrator, /llm/ops=operator, staff=viewer, apps=member, red=team:red",
    }


@pytest.fixture(scope="module")
def gateway(provider: Provider) -> Iterator[Gateway]:
    wishes = {"DJANGO_SUPERUSER_USERNAME": "ada", "DJANGO_SUPERUSER_PASSWORD": "a rather long passphrase"}
    with Gateway(env={**settings_for(provider), **wishes}) as running:
        running.manage("first_run", "--json")
        yield running


class Browser:
    """Somebody's browser at the gateway."""

    opened: ClassVar[list[httpx.Client]] = []

    def __init__(self, gateway: Gateway) -> None:
        self.http = httpx.Client(base_url=gateway.url, trust_env=False, timeout=30)
        self.opened.append(self.http)

    def post(self, path: str, page: str = "/admin/login/", **form: str) -> httpx.Response:
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', self.http.get(page).text)
        assert token is not None
        return self.http.post(path, data={"csrfmiddlewaretoken": token[1], **form})

    def leave(self, path: str = "/admin/account/sign-on/", page: str = "/admin/login/", **form: str) -> str:
        """Press the button; the provider's address that we lead to."""
        answer = self.post(path, page, **form)
        assert answer.status_code == 200, answer.text
        found = re.search(r'content="0;url=([^"]+)"', answer.text)
        assert found is not None
        return html.unescape(found[1])

    def sign_on(self, provider: Provider, sub: str, **form: str) -> httpx.Response:
        return self.http.get(provider.consent(self.leave(**form), sub))

    def password(self, name: str, password: str) -> httpx.Response:
        return self.post("/admin/login/", username=name, password=password)

    def inside(self) -> bool:
        return self.http.get("/admin/").status_code == 200


def facts(gateway: Gateway, name: str) -> Any:
    """What the gateway knows of a user; None when there is no such user."""
    text = gateway.shell(
        "import json\nfrom django.contrib.auth.models import User\n"
        f"user = User.objects.filter(username={name!r}).first()\n"
        "print(json.dumps(None if user is None else {'groups': sorted(user.groups.values_list('name', flat=True)), "
        "'staff': user.is_staff, 'super': user.is_superuser, 'email': user.email, 'password': user.has_usable_password()}))"
    )
    return json.loads(text)


def shell(gateway: Gateway, change: str) -> None:
    """Change something as an administrator would."""
    gateway.shell(
        "from audit.changes import changes\nfrom django.contrib.auth.models import User, Group\n"
        f"with changes(actor=None, via='system'):\n    {change}"
    )


def test_the_login_page_has_a_button_that_leads_to_the_provider(gateway: Gateway, provider: Provider) -> None:
    browser = Browser(gateway)
    assert BUTTON in browser.http.get("/admin/login/").text

    address = urlsplit(browser.leave())
    asked = {name: values[0] for name, values in parse_qs(address.query).items()}

    assert f"{address.scheme}://{address.netloc}" == provider.url
    assert asked["response_type"] == "code" and asked["client_id"] == "penstock"
    assert asked["redirect_uri"] == f"{gateway.url}/admin/account/sign-on/callback/"
    assert asked["code_challenge_method"] == "S256" and len(asked["code_challenge"]) >= 43
    assert len(asked["state"]) >= 16 and len(asked["nonce"]) >= 32
    assert "openid" in asked["scope"].split()


def test_a_new_person_gets_the_mapped_roles_and_an_account_without_a_password(
    gateway: Gateway, provider: Provider
) -> None:
    provider.put("grace", realm_access={"roles": ["/llm/ops", "red", "unrelated"]}, email="grace@example.com")
    browser = Browser(gateway)

    answer = browser.sign_on(provider, "grace", next="/admin/providers/server/")

    assert (answer.status_code, answer.headers["location"]) == (302, "/admin/providers/server/")
    assert browser.inside()
    assert facts(gateway, "grace") == {
        "groups": ["operator", "red"], "staff": True, "super": False, "email": "grace@example.com", "password": False,
    }  # fmt: skip
    assert browser.http.get("/api/v1/servers").status_code == 200
    assert browser.http.get("/admin/auth/user/").status_code == 403


def test_roles_follow_the_provider_with_every_login(gateway: Gateway, provider: Provider) -> None:
    provider.put("kay", realm_access={"roles": ["llm-admins", "red"]})
    Browser(gateway).sign_on(provider, "kay")
    assert facts(gateway, "kay")["groups"] == ["administrator", "red"]
    shell(
        gateway,
        "User.objects.get(username='kay').groups.add(Group.objects.create(name='blue'), Group.objects.get(name='operator'))",
    )

    provider.put("kay", realm_access={"roles": ["staff"]})
    browser = Browser(gateway)
    browser.sign_on(provider, "kay")

    assert facts(gateway, "kay")["groups"] == ["blue", "viewer"]
    assert browser.http.get("/admin/auth/user/").status_code == 403


@pytest.mark.parametrize(
    "claims",
    [
        {},
        {"realm_access": {"roles": ["unrelated"]}},
        {"realm_access": "llm"},
        {"realm_access": {"roles": [1, None]}},
    ],
)
def test_nobody_gets_an_account_without_a_role(
    gateway: Gateway, provider: Provider, claims: dict[str, Any]
) -> None:
    provider.put("nobody", **claims)
    browser = Browser(gateway)

    answer = browser.sign_on(provider, "nobody")

    assert answer.status_code == 403
    assert "none of your groups or roles" in answer.text
    assert not browser.inside()
    assert facts(gateway, "nobody") is None


def test_whoever_lost_his_last_role_loses_it_here_too_and_is_not_let_in(
    gateway: Gateway, provider: Provider
) -> None:
    provider.put("leaver", realm_access={"roles": ["llm-admins"]})
    Browser(gateway).sign_on(provider, "leaver")
    provider.put("leaver", realm_access={"roles": []})
    browser = Browser(gateway)

    assert browser.sign_on(provider, "leaver").status_code == 403

    assert not browser.inside()
    assert facts(gateway, "leaver")["groups"] == [] and facts(gateway, "leaver")["staff"] is False


def test_a_disabled_user_is_not_let_in(gateway: Gateway, provider: Provider) -> None:
    provider.put("off", realm_access={"roles": ["staff"]})
    browser = Browser(gateway)
    browser.sign_on(provider, "off")
    assert browser.inside()
    shell(gateway, "user = User.objects.get(username='off'); user.is_active = False; user.save()")

    assert not browser.inside()
    answer = browser.sign_on(provider, "off")
    assert answer.status_code == 403 and "switched off" in answer.text
    assert not browser.inside()


def test_a_member_is_led_to_what_he_may_use(gateway: Gateway, provider: Provider) -> None:
    provider.put("mo", realm_access={"roles": ["apps"]})
    browser = Browser(gateway)

    assert browser.sign_on(provider, "mo").headers["location"] == "/api/docs/"
    assert browser.http.get("/api/v1/gateway-keys").status_code == 200
    assert not browser.inside()


def test_neither_a_name_nor_an_address_of_mail_makes_somebody_somebody_else(
    gateway: Gateway, provider: Provider
) -> None:
    shell(gateway, "User.objects.filter(username='ada').update(email='ada@example.com')")
    provider.put(
        "impostor",
        preferred_username="ada",
        email="ada@example.com",
        email_verified=True,
        realm_access={"roles": ["staff"]},
    )
    browser = Browser(gateway)
    browser.sign_on(provider, "impostor")

    assert browser.inside()
    assert browser.http.get("/admin/auth/user/").status_code == 403
    assert facts(gateway, "ada")["groups"] == []


def test_somebody_links_his_account_and_then_logs_in_with_either(
    gateway: Gateway, provider: Provider
) -> None:
    password = "a rather long passphrase"
    shell(
        gateway,
        f"user = User.objects.create_user('local', password='{password}'); user.groups.add(Group.objects.get(name='viewer'))",
    )
    provider.put("elsewhere", realm_access={"roles": ["/llm/ops"]})
    browser = Browser(gateway)
    browser.password("local", password)

    again = browser.post("/admin/account/sign-on/link/", "/admin/account/")
    assert again.headers["location"].startswith("/admin/account/again/")
    browser.post("/admin/account/again/", "/admin/account/again/", password=password)
    address = browser.leave("/admin/account/sign-on/link/", "/admin/account/")
    browser.http.get(provider.consent(address, "elsewhere"))

    other = Browser(gateway)
    assert other.sign_on(provider, "elsewhere").status_code == 302
    assert other.inside()
    assert facts(gateway, "local")["groups"] == ["operator"]
    assert facts(gateway, "elsewhere") is None


def test_an_answer_that_was_not_asked_for_is_refused(gateway: Gateway, provider: Provider) -> None:
    provider.put("victim", realm_access={"roles": ["staff"]})
    attacker, victim = Browser(gateway), Browser(gateway)
    answer = provider.consent(attacker.leave(), "victim")

    for path in (
        answer,
        "/admin/account/sign-on/callback/",
        "/admin/account/sign-on/callback/?code=x&state=y",
    ):
        assert victim.http.get(path).status_code == 403
    assert attacker.http.get(answer.replace("code=", "code=x")).status_code == 403
    assert not victim.inside() and not attacker.inside()


def test_a_login_is_recorded_with_how_it_was_done_and_no_secret(gateway: Gateway, provider: Provider) -> None:
    provider.put("seen", realm_access={"roles": ["staff"]})
    Browser(gateway).sign_on(provider, "seen")

    text = gateway.shell(
        "from audit.models import Entry\n"
        "for each in Entry.objects.filter(entity_name='seen'): print(each.action, each.changes)"
    )
    assert "add_user" in text and "start_session" in text and "socialaccount" in text
    assert "a client secret" not in text + gateway.logs()


# -- what an issuer may say --------------------------------------------------------------------------------------------


def test_a_token_is_believed_only_when_it_is_for_us_and_for_this_login() -> None:
    """The checks of an ID token, one by one, with keys of our own."""
    import jwt
    from allauth.socialaccount.providers.oauth2.client import OAuth2Error
    from cryptography.hazmat.primitives.asymmetric import rsa

    key, other = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
    published = {**json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key())), "kid": "1", "use": "sig"}
    good = {
        "iss": "https://login.example.com",
        "aud": "penstock",
        "sub": "x",
        "iat": 1,
        "exp": 2**31,
        "nonce": "n",
    }

    class Known(sso.Issuer):
        openid_config = {"issuer": "https://login.example.com", "jwks_uri": "https://login.example.com/keys"}

    class Answers(sso.IssuerSession):
        keys: Any = {"keys": [published]}

        def get(self, url: str, headers: Any = None) -> httpx.Response:
            return httpx.Response(200, content=json.dumps(self.keys), request=httpx.Request("GET", url))

    def verified(
        claims: dict[str, Any], *, by: Any = key, algorithm: str = "RS256", kid: str = "1"
    ) -> dict[str, Any]:
        adapter = Known(None, "https://login.example.com")
        adapter.nonce = "n"
        token = jwt.encode(claims, by, algorithm=algorithm, headers={"kid": kid})
        app = type("App", (), {"client_id": "penstock"})
        found: dict[str, Any] = adapter.verified(app, token)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sso, "IssuerSession", Answers)
        assert verified(good)["sub"] == "x"
        assert verified({**good, "aud": ["penstock", "other"], "azp": "penstock"})
        for wrong in (
            {**good, "iss": "https://evil.example.com"},
            {**good, "aud": "other"},
            {**good, "aud": ["penstock", "other"]},
            {**good, "exp": 1},
            {**good, "nonce": "another"},
            {name: value for name, value in good.items() if name != "nonce"},
            {name: value for name, value in good.items() if name != "sub"},
        ):
            with pytest.raises(OAuth2Error):
                verified(wrong)
        for options in (
            {"by": other},
            {"by": "a shared secret of 32 bytes or so", "algorithm": "HS256"},
            {"kid": "2"},
        ):
            with pytest.raises(OAuth2Error):
                verified(good, **options)
        with pytest.raises(OAuth2Error):
            verified(good, by=None, algorithm="none")
        for nonsense in (
            [],
            [published],
            {},
            {"keys": "x"},
            {"keys": ["x"]},
            {"keys": [[published]]},
            None,
            1,
        ):
            patch.setattr(Answers, "keys", nonsense)
            with pytest.raises(OAuth2Error):
                verified(good)


@pytest.mark.parametrize(
    ("claims", "path", "found"),
    [
        ({"groups": ["a", "/b"]}, "groups", {"a", "/b"}),
        ({"realm_access": {"roles": ["a"]}}, "realm_access.roles", {"a"}),
        ({"resource_access": {"penstock": {"roles": ["a"]}}}, "resource_access.penstock.roles", {"a"}),
        ({"https://example.com/roles": ["a"]}, "https://example.com/roles", {"a"}),
        ({"scope": "a b"}, "scope", {"a", "b"}),
        ({"groups": {"a": 1}}, "groups", set()),
        ({"groups": None}, "groups.deeper.still", set()),
        ({}, "groups", set()),
    ],
)
def test_claims_are_found_in_the_shapes_of_providers(claims: Any, path: str, found: set[str]) -> None:
    assert sso.claim_values(claims, path) == found


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/keys",
        "http://metadata.google.internal/",
        "http://192.0.2.1/",
        "file:///etc/passwd",
    ],
)
def test_an_issuer_leads_to_no_place_where_nothing_may_be_dialled(url: str) -> None:
    import requests

    with pytest.raises(requests.RequestException):
        sso.IssuerSession().get(url)


def test_the_roles_of_settings_are_those_of_the_house() -> None:
    from audit.roles import Role

    assert set(ROLES) == set(Role)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"OIDC_CLIENT_ID": ""}, "OIDC_CLIENT_ID"),
        ({"OIDC_CLIENT_SECRET": ""}, "OIDC_CLIENT_SECRET"),
        ({"OIDC_ROLE_MAP": ""}, "OIDC_ROLE_MAP"),
        ({"OIDC_ROLE_MAP": "admins=admin"}, "OIDC_ROLE_MAP"),
        ({"OIDC_ROLE_MAP": "admins=team:operator"}, "OIDC_ROLE_MAP"),
        ({"OIDC_ISSUER": ""}, "OIDC_ISSUER"),
        ({"OIDC_ISSUER": "http://login.example.com"}, "OIDC_ISSUER"),
        ({"OIDC_ISSUER": "https://login.example.com/.well-known/openid-configuration"}, "OIDC_ISSUER"),
    ],
)
def test_check_names_a_wrong_setting(provider: Provider, change: dict[str, str], named: str) -> None:
    check = "from django.core.management import call_command; call_command('check')"
    with (
        Gateway(env={**settings_for(provider), **change}, start=False) as gateway,
        pytest.raises(AssertionError) as told,
    ):
        gateway.shell(check)

    assert f"{named}: " in str(told.value)
    assert "a client secret" not in str(told.value)


@pytest.mark.parametrize("answer", [[], "x", None, {"issuer": []}])
def test_an_issuer_that_answers_nonsense_lets_nobody_in_and_breaks_nothing(
    client: Any, db: None, settings: Any, monkeypatch: pytest.MonkeyPatch, answer: Any
) -> None:
    class Answers(sso.IssuerSession):
        def get(self, url: str, headers: Any = None) -> httpx.Response:
            return httpx.Response(200, content=json.dumps(answer), request=httpx.Request("GET", url))

    issuer = "https://login.example.com"
    app = {"provider_id": issuer, "client_id": "penstock", "secret": "x", "settings": {"server_url": issuer}}
    settings.OIDC_ISSUER, settings.SOCIALACCOUNT_PROVIDERS = issuer, {"openid_connect": {"APPS": [app]}}
    monkeypatch.setattr(sso, "IssuerSession", Answers)

    assert client.post("/admin/account/sign-on/").status_code == 502


def test_without_an_issuer_there_is_no_single_sign_on(client: Any, db: None) -> None:
    assert BUTTON not in client.get("/admin/login/").content.decode()
    assert client.post("/admin/account/sign-on/").status_code == 404
    assert client.get("/admin/account/sign-on/callback/").status_code == 404
