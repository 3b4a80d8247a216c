"""Who is asking: sessions with CSRF, tokens, and nothing else."""

from __future__ import annotations

import threading
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.db import connection
from rest_framework_simplejwt.token_blacklist.models import OutstandingToken

from audit.changes import changes
from audit.models import Entry
from proxy import keys
from proxy.models import GatewayKey
from tests.support.api import V1, anybody, as_, error

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"


def tokens(name: str = "viewer", password: str = PASSWORD) -> dict[str, Any]:
    response = anybody().post(f"{V1}/auth/token", {"username": name, "password": password})
    assert response.status_code == 200, response.content
    found: dict[str, Any] = response.json()
    return found


def with_token(token: str, **options: Any) -> Any:
    return anybody(**options).get(f"{V1}/servers", headers={"Authorization": f"Bearer {token}"})


def test_a_token_opens_what_its_users_role_opens(viewer: User, settings: Any) -> None:
    pair = tokens()

    assert set(pair) == {"access", "refresh", "expires_in"}
    assert pair["expires_in"] == settings.JWT_ACCESS_SECONDS
    assert with_token(pair["access"]).status_code == 200
    bearer = {"Authorization": f"Bearer {pair['access']}"}
    assert anybody().post(f"{V1}/servers", {}, headers=bearer).status_code == 403


def test_without_login_there_is_nothing(db: None) -> None:
    for name in ("servers", "api-keys", "active", "providers", "gateway-keys", "providers/1/health"):
        response = anybody().get(f"{V1}/{name}")
        assert response.status_code == 401
        assert error(response)["code"] == "AUTHENTICATION_REQUIRED"
        assert response["WWW-Authenticate"].startswith("Bearer")


def test_a_wrong_password_is_401_and_says_no_more_than_that(viewer: User) -> None:
    answers = [
        anybody().post(f"{V1}/auth/token", {"username": name, "password": "wrong"})
        for name in ("viewer", "nobody")
    ]

    assert {answer.status_code for answer in answers} == {401}
    assert len({error(answer)["message"] for answer in answers}) == 1
    assert answers[0]["WWW-Authenticate"].startswith("Bearer")


def test_guessing_passwords_is_stopped(viewer: User, settings: Any) -> None:
    client = anybody()
    body = {"username": "viewer", "password": "wrong"}
    for _ in range(settings.AXES_FAILURE_LIMIT):
        response = client.post(f"{V1}/auth/token", body)

    response = client.post(f"{V1}/auth/token", {**body, "password": PASSWORD})

    assert response.status_code == 429
    assert error(response)["code"] == "THROTTLED"
    assert int(response["Retry-After"]) > 0


def test_an_inactive_user_gets_no_token_and_his_old_one_is_worth_nothing(viewer: User) -> None:
    pair = tokens()
    with changes(actor=None, via="system"):
        viewer.is_active = False
        viewer.save()

    assert with_token(pair["access"]).status_code == 401
    assert anybody().post(f"{V1}/auth/token/refresh", {"refresh": pair["refresh"]}).status_code == 401
    body = {"username": "viewer", "password": PASSWORD}
    assert anybody().post(f"{V1}/auth/token", body).status_code == 401


def test_a_changed_password_ends_tokens(viewer: User) -> None:
    pair = tokens()
    with changes(actor=None, via="system"):
        viewer.set_password("battery staple correct")
        viewer.save()

    assert with_token(pair["access"]).status_code == 401


def test_a_refresh_token_is_spent_by_its_use(viewer: User) -> None:
    pair = tokens()
    path = f"{V1}/auth/token/refresh"

    new = anybody().post(path, {"refresh": pair["refresh"]})

    assert new.status_code == 200
    assert set(new.json()) == {"access", "refresh", "expires_in"}
    assert with_token(new.json()["access"]).status_code == 200
    again = anybody().post(path, {"refresh": pair["refresh"]})
    assert again.status_code == 401
    assert error(again)["code"] == "AUTHENTICATION_REQUIRED"


def refreshed(pair: dict[str, Any]) -> Any:
    return anybody().post(f"{V1}/auth/token/refresh", {"refresh": pair["refresh"]})


def test_a_spent_refresh_token_that_comes_back_ends_all_that_came_of_its_login(viewer: User) -> None:
    stolen, other = tokens(), tokens()
    second = refreshed(stolen).json()
    third = refreshed(second).json()

    assert refreshed(stolen).status_code == 401

    assert refreshed(third).status_code == 401
    assert refreshed(other).status_code == 200
    entry = Entry.objects.get(action="revoke_token")
    assert entry.entity_name == "viewer" and "again" in entry.changes["why"][1]


def test_revoking_ends_what_a_login_was_renewed_to_and_no_other_login(viewer: User) -> None:
    first, other = tokens(), tokens()
    second = refreshed(first).json()
    anybody().post(f"{V1}/auth/token/revoke", {"refresh": second["refresh"]})

    assert refreshed(second).status_code == 401
    assert refreshed(other).status_code == 200


@pytest.mark.django_db(transaction=True)
def test_revoking_ends_a_renewal_that_is_on_its_way(viewer: User) -> None:
    first = tokens()
    revoked: list[int] = []
    spent: list[str] = []

    def revoke() -> None:
        try:
            answer = anybody().post(f"{V1}/auth/token/revoke", {"refresh": first["refresh"]})
            revoked.append(answer.status_code)
        finally:
            connection.close()

    other = threading.Thread(target=revoke)

    def between(execute: Any, sql: str, *rest: Any) -> Any:
        if spent and other.ident is None and sql.startswith("SELECT"):
            other.start()
            # It can only wait for us; if it did not, it would be done by then.
            other.join(0.5)
        if sql.startswith('INSERT INTO "token_blacklist_blacklistedtoken"'):
            spent.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(between):
        second = refreshed(first)
    other.join()

    assert (second.status_code, revoked) == (200, [204])
    assert refreshed(second.json()).status_code == 401


def test_a_changed_password_ends_refresh_tokens(viewer: User) -> None:
    pair = tokens()
    with changes(actor=None, via="system"):
        viewer.set_password("battery staple correct")
        viewer.save()

    assert refreshed(pair).status_code == 401


def test_no_token_is_kept_in_the_database(viewer: User) -> None:
    refreshed(tokens())

    assert {row.token for row in OutstandingToken.objects.all()} == {""}
    assert OutstandingToken.objects.count() == 2


def test_a_token_is_recorded(viewer: User) -> None:
    tokens()

    entry = Entry.objects.get(action="issue_token")
    assert (entry.username, entry.via, entry.ip) == ("viewer", "api", "127.0.0.1")


def test_a_revoked_refresh_token_is_worth_nothing(viewer: User) -> None:
    pair = tokens()

    assert anybody().post(f"{V1}/auth/token/revoke", {"refresh": pair["refresh"]}).status_code == 204
    assert anybody().post(f"{V1}/auth/token/revoke", {"refresh": pair["refresh"]}).status_code == 204
    assert anybody().post(f"{V1}/auth/token/refresh", {"refresh": pair["refresh"]}).status_code == 401


def test_a_refresh_token_opens_nothing_itself(viewer: User) -> None:
    assert with_token(tokens()["refresh"]).status_code == 401


@pytest.mark.parametrize(
    "body", [{}, {"username": "viewer"}, {"username": 1, "password": []}, [], {"colour": 1}]
)
def test_a_malformed_login_is_400(db: None, body: Any) -> None:
    assert error(anybody().post(f"{V1}/auth/token", body))["code"] == "VALIDATION_ERROR"


def test_a_token_expires(viewer: User, settings: Any) -> None:
    from rest_framework_simplejwt.tokens import AccessToken

    token = AccessToken.for_user(viewer)
    token.set_exp(lifetime=-timedelta(seconds=5))

    assert with_token(str(token)).status_code == 401


def test_r12_other_bearers_are_401(viewer: User) -> None:
    for value in (
        "Bearer",
        "Bearer a b",
        "Bearer ' OR '1'='1",
        "Basic dmlld2VyOng=",
        "Token x",
        "Bearer " + "x" * 9000,
        "é",
    ):
        response = anybody().get(f"{V1}/servers", headers={"Authorization": value})
        assert response.status_code == 401, value
        assert error(response)


def test_a_gateway_key_opens_nothing_here(owner: User) -> None:
    with changes(actor=None, via="system"):
        key = GatewayKey(name="app", owner=owner)
        whole = keys.give_secret(key)
        key.save()

    assert with_token(whole).status_code == 401
    for name in ("x-api-key", "api-key", "x-goog-api-key"):
        assert anybody().get(f"{V1}/servers", headers={name: whole}).status_code == 401
    assert anybody().post(f"{V1}/auth/token", {"username": "owner", "password": whole}).status_code == 401


def test_with_a_token_the_session_does_not_count(owner: User, viewer: User) -> None:
    client = as_(owner)
    bearer = {"Authorization": f"Bearer {tokens()['access']}"}
    body = {"name": "x", "base_url": "http://127.0.0.1:9"}

    assert client.post(f"{V1}/servers", body, headers=bearer).status_code == 403
    assert client.get(f"{V1}/servers", headers={"Authorization": "Bearer nonsense"}).status_code == 401


def test_a_session_needs_the_csrf_token_to_change_something(operator: User) -> None:
    client = anybody(enforce_csrf_checks=True)
    client.force_login(operator, backend="django.contrib.auth.backends.ModelBackend")
    body = {"name": "x", "base_url": "http://127.0.0.1:9"}

    assert client.get(f"{V1}/servers").status_code == 200
    response = client.post(f"{V1}/servers", body)
    assert response.status_code == 403
    assert error(response)["code"] == "PERMISSION_DENIED"

    client.cookies["csrftoken"] = "a" * 32
    assert client.post(f"{V1}/servers", body, headers={"X-CSRFToken": "b" * 32}).status_code == 403
    assert client.post(f"{V1}/servers", body, headers={"X-CSRFToken": "a" * 32}).status_code == 201


def test_a_token_needs_no_csrf_token(operator: User) -> None:
    client = anybody(enforce_csrf_checks=True)
    bearer = {"Authorization": f"Bearer {tokens('operator')['access']}"}
    body = {"name": "x", "base_url": "http://127.0.0.1:9"}

    assert client.post(f"{V1}/servers", body, headers=bearer).status_code == 201
