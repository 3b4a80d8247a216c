"""Tokens for browsers: they stand for a gateway key for a few minutes, on the data plane and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import httpx
import pytest
import time_machine
from django.conf import settings
from django.contrib.auth.models import User
from django.utils import timezone

from audit.changes import changes
from audit.models import Entry
from proxy import auth, keys, snapshot
from proxy.errors import InvalidApiKey
from proxy.models import GatewayKey
from tests.support.api import V1, anybody, as_, error
from tests.support.inprocess import House

pytestmark = pytest.mark.django_db


def key_of(owner: User | None = None, **fields: Any) -> GatewayKey:
    with changes(actor=None, via="system"):
        key = GatewayKey(name=f"app {GatewayKey.objects.count()}", owner=owner, **fields)
        keys.give_secret(key)
        key.save()
    return key


def admitted(token: str) -> auth.Caller:
    """Whom the data plane takes the bearer for, by the configuration as it is now."""
    return auth.authenticate(token, snapshot.build().callers, settings.PENSTOCK_PEPPERS)


def lend(user: User, key: GatewayKey, **body: Any) -> Any:
    return as_(user).post(f"{V1}/gateway-keys/{key.pk}/browser-token", body)


def test_a_browser_token_stands_for_its_key_with_all_its_limits(operator: User) -> None:
    key = key_of(requests_per_minute=7, allowed_models=["tiny"])

    answer = lend(operator, key)

    assert answer.status_code == 200
    assert set(answer.json()) == {"token", "expires_at"}
    token = answer.json()["token"]
    assert token.startswith("pen_tmp_")
    caller = admitted(token)
    assert (caller.id, caller.requests_per_minute, caller.allowed_models) == (key.pk, 7, ("tiny",))
    assert token not in repr(list(Entry.objects.values()))
    assert Entry.objects.filter(action="issue_browser_token", username="operator").count() == 1


@pytest.mark.parametrize(("body", "seconds"), [({}, 900), ({"expires_in": 60}, 60)])
def test_it_ends_by_itself_and_after_fifteen_minutes_at_the_latest(
    operator: User, body: dict[str, int], seconds: int
) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        token = lend(operator, key_of(), **body).json()["token"]
        clock.shift(seconds - 2)
        admitted(token)
        clock.shift(2)
        with pytest.raises(InvalidApiKey):
            admitted(token)


@pytest.mark.parametrize("seconds", [0, -1, 901, "soon"])
def test_nobody_gets_one_for_longer(operator: User, seconds: Any) -> None:
    assert error(lend(operator, key_of(), expires_in=seconds))["code"] == "VALIDATION_ERROR"


def test_it_never_outlives_its_key(operator: User) -> None:
    soon = timezone.now() + timedelta(seconds=30)
    with time_machine.travel(timezone.now(), tick=False) as clock:
        token = lend(operator, key_of(expires_at=soon)).json()["token"]
        clock.shift(31)
        with pytest.raises(InvalidApiKey):
            admitted(token)


def test_revoking_the_key_ends_it(operator: User) -> None:
    key = key_of()
    token = lend(operator, key).json()["token"]
    with changes(actor=None, via="system"):
        keys.revoke(key)

    with pytest.raises(InvalidApiKey):
        admitted(token)
    assert lend(operator, key).status_code == 409


def test_a_new_secret_ends_it_when_the_old_one_ends(operator: User) -> None:
    key = key_of()
    token = lend(operator, key).json()["token"]
    key.refresh_from_db()
    with changes(actor=None, via="system"):
        keys.rotate(key, overlap=timedelta(minutes=1))
    admitted(token)

    with time_machine.travel(timezone.now() + timedelta(minutes=2)), pytest.raises(InvalidApiKey):
        admitted(token)


def test_no_character_of_it_may_be_changed(operator: User) -> None:
    token = lend(operator, key_of()).json()["token"]
    for place in range(len(token)):
        other = "1" if token[place] != "1" else "2"
        with pytest.raises(InvalidApiKey):
            admitted(token[:place] + other + token[place + 1 :])


def test_a_longer_life_cannot_be_written_into_it(operator: User) -> None:
    parts = keys.parse_browser_token(lend(operator, key_of()).json()["token"])
    assert parts is not None
    forged = f"pen_tmp_{parts.key_id}{parts.until + 3600:08x}{parts.mac}"

    with pytest.raises(InvalidApiKey):
        admitted(f"{forged}_{keys.checksum(forged)}")


def test_a_key_whose_pepper_is_gone_is_not_lent(operator: User, settings: Any) -> None:
    key = key_of()
    settings.PENSTOCK_PEPPERS = {key.pepper + 1: b"x" * 32}

    answer = lend(operator, key)

    assert answer.status_code == 409
    assert "PENSTOCK_PEPPERS" in error(answer)["message"]


def test_a_member_lends_his_own_key_and_sees_no_other(person: Callable[..., User]) -> None:
    member, other = person("mo", "member"), person("eve", "member")
    key = key_of(member)

    assert lend(member, key).status_code == 200
    assert lend(other, key).status_code == 404


def test_a_viewer_lends_nothing(viewer: User) -> None:
    assert lend(viewer, key_of()).status_code == 403


def test_it_opens_nothing_on_the_control_plane(operator: User) -> None:
    token = lend(operator, key_of(operator)).json()["token"]
    bearer = {"Authorization": f"Bearer {token}"}

    for path in ("servers", "gateway-keys", "gateway-keys/1/browser-token"):
        assert anybody().get(f"{V1}/{path}", headers=bearer).status_code == 401
    for name in ("x-api-key", "api-key"):
        assert anybody().get(f"{V1}/servers", headers={name: token}).status_code == 401


@pytest.mark.no_database
def test_the_data_plane_takes_it_over_http_and_asks_no_database(house: House, settings: Any) -> None:
    parts = keys.parse(house.key)
    assert parts is not None
    caller = house.watcher.snapshot.callers[parts.key_id]
    body = f"pen_tmp_{parts.key_id}{int(timezone.now().timestamp()) + 60:08x}"
    text = body + keys.browser_mac(body, caller.digest, settings.PENSTOCK_PEPPERS[1])
    token = f"{text}_{keys.checksum(text)}"

    def models(bearer: str) -> int:
        return httpx.get(f"{house.url}/v1/models", headers={"Authorization": f"Bearer {bearer}"}).status_code

    assert models(token) == 200
    assert models(token[:-1] + ("x" if token[-1] != "x" else "y")) == 401
