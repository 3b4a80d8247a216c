"""Getting into the admin and out of it: passwords, locks, sessions, and the record of all that."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import time_machine
from axes.models import AccessAttempt
from django.conf import settings as django_settings
from django.contrib.auth.models import User
from django.db import DatabaseError, connection
from django.test import Client
from django.utils import timezone

from audit.changes import changes
from audit.models import Entry
from audit.strict_json import loads
from tests.support.api import V1, anybody, error
from tests.support.codes import code_of, enrol

pytestmark = pytest.mark.django_db
PASSWORD = "correct horse battery"
LOGIN = "/admin/login/"
CODE = "/admin/account/code/"


@pytest.fixture
def client() -> Client:
    django_settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
    return Client()


def log_in(client: Client, name: str = "operator", password: str = PASSWORD, to: str = "") -> Any:
    query = f"?next={to}" if to else ""
    return client.post(LOGIN + query, {"username": name, "password": password, "next": to})


def entries(action: str) -> list[Entry]:
    return list(Entry.objects.filter(action=action))


def inside(client: Client) -> bool:
    return client.get("/admin/").status_code == 200


# -- a password --------------------------------------------------------------------------------------------------------


def test_a_login_makes_a_session_with_a_new_key_and_is_recorded(client: Client, operator: User) -> None:
    client.get(LOGIN)
    client.session["before"] = 1
    client.session.save()
    before = client.session.session_key

    answer = log_in(client)

    assert (answer.status_code, answer["Location"]) == (302, "/admin/")
    assert client.session.session_key != before
    assert inside(client)
    (entry,) = entries("start_session")
    assert (entry.username, entry.entity_id, entry.via, entry.ip) == (
        "operator",
        str(operator.pk),
        "admin",
        "127.0.0.1",
    )
    assert entry.changes == {"by": [None, "password"]}


def test_a_login_leads_where_one_wanted_to_go_but_not_elsewhere(client: Client, operator: User) -> None:
    assert log_in(client, to="/admin/providers/server/")["Location"] == "/admin/providers/server/"
    for elsewhere in ("https://evil.example.com/", "//evil.example.com", "javascript:alert(1)"):
        assert log_in(Client(), to=elsewhere)["Location"] == "/admin/"


def test_a_login_without_its_csrf_token_is_refused(operator: User) -> None:
    assert log_in(Client(enforce_csrf_checks=True)).status_code == 403


def test_a_member_has_no_business_in_the_admin(client: Client, person: Any) -> None:
    person("mo", "member")

    assert log_in(client, "mo").status_code == 200
    assert not inside(client)


def test_a_logout_ends_the_session_and_is_recorded(client: Client, operator: User) -> None:
    log_in(client)

    assert client.get("/admin/logout/").status_code == 405
    assert client.post("/admin/logout/").status_code == 200

    assert not inside(client)
    (entry,) = entries("end_session")
    assert entry.username == "operator"


def test_a_wrong_password_is_recorded_and_an_unknown_name_is_not_kept(client: Client, operator: User) -> None:
    log_in(client, password="wrong")
    log_in(client, name="my-secret-password", password="x")

    known, unknown = sorted(entries("fail_login"), key=lambda entry: entry.seq)
    assert (known.entity_name, known.username) == ("operator", "")
    assert unknown.entity_name == ""
    kept = [*Entry.objects.values(), *AccessAttempt.objects.values()]
    assert "my-secret-password" not in repr(kept)


@pytest.mark.parametrize("by", ["name", "address"])
def test_r18_the_tenth_wrong_guess_locks_the_name_and_the_address(
    client: Client, owner: User, operator: User, by: str
) -> None:
    for number in range(9):
        where = f"10.1.1.{number}" if by == "name" else "127.0.0.1"
        who = "operator" if by == "name" else f"nobody-{number}"
        assert (
            client.post(LOGIN, {"username": who, "password": "wrong"}, REMOTE_ADDR=where).status_code == 200
        )
    answer = log_in(client, password="wrong")

    assert answer.status_code == 429
    assert int(answer["Retry-After"]) == 300
    assert "Try again in 5 minutes" in answer.content.decode()
    assert log_in(client).status_code == 429
    assert not inside(client)
    body = {"username": "operator", "password": PASSWORD}
    assert error(anybody().post(f"{V1}/auth/token", body))["code"] == "THROTTLED"
    assert len(entries("lock_login")) == 1
    if by == "address":
        assert log_in(client, "owner").status_code == 429


def test_r18_the_lock_ends_after_five_minutes_however_often_one_tries_meanwhile(
    client: Client, operator: User
) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        for _ in range(10):
            log_in(client, password="wrong")
        clock.shift(200)
        assert log_in(client, password="wrong").status_code == 429
        recorded = Entry.objects.count()
        assert log_in(client).status_code == 429
        assert Entry.objects.count() == recorded
        clock.shift(101)
        assert log_in(client).status_code == 302


def test_r18_a_good_login_between_guesses_takes_none_back(
    client: Client, owner: User, operator: User
) -> None:
    for _ in range(9):
        log_in(client, "owner", "wrong")
    assert log_in(client, "operator").status_code == 302

    assert log_in(Client(), "owner", "wrong").status_code == 429


def test_r18_guesses_at_the_old_password_count_like_others(client: Client, operator: User) -> None:
    log_in(client)
    new = {"new_password1": "battery staple correct", "new_password2": "battery staple correct"}

    def change(old: str) -> int:
        return client.post("/admin/password_change/", {"old_password": old, **new}).status_code

    statuses = [change(f"guess {number}") for number in range(10)]

    assert statuses == [200] * 9 + [429]
    assert change(PASSWORD) == 429
    assert log_in(Client()).status_code == 429
    assert User.objects.get(pk=operator.pk).check_password(PASSWORD)
    assert [entry.entity_name for entry in entries("fail_login")] == ["operator"] * 9
    assert len(entries("lock_login")) == 1
    kept = repr(list(AccessAttempt.objects.values()))
    assert "guess" not in kept and "staple" not in kept


def test_without_a_record_there_is_no_session(client: Client, operator: User) -> None:
    def refuse(execute: Any, sql: str, *rest: Any) -> Any:
        if "audit_entry" in sql and sql.startswith("INSERT"):
            raise DatabaseError("the log is full")
        return execute(sql, *rest)

    with connection.execute_wrapper(refuse):
        assert log_in(client).status_code == 503

    assert not inside(client)


# -- sessions ----------------------------------------------------------------------------------------------------------


def test_a_session_ends_after_half_an_hour_of_silence(client: Client, operator: User) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        log_in(client)
        for _ in range(4):
            clock.shift(20 * 60)
            assert inside(client)
        clock.shift(30 * 60)
        assert not inside(client)
        clock.shift(-60)
        assert not inside(client)


def test_a_session_ends_after_twelve_hours_however_busy(client: Client, operator: User) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        log_in(client)
        for _ in range(12 * 3):
            assert inside(client)
            clock.shift(20 * 60)
        assert not inside(client)
        assert anybody().get(f"{V1}/servers").status_code == 401


def test_not_every_request_writes_its_session(client: Client, operator: User) -> None:
    with time_machine.travel(timezone.now(), tick=False) as clock:
        log_in(client)
        assert inside(client)
        written = client.session["seen_at"]
        clock.shift(59)
        assert inside(client)
        assert client.session["seen_at"] == written
        clock.shift(1)
        assert inside(client)
        assert client.session["seen_at"] == written + 60


def test_switching_somebody_off_ends_his_session_at_once(client: Client, operator: User) -> None:
    log_in(client)
    with changes(actor=None, via="system"):
        operator.is_active = False
        operator.save()

    assert not inside(client)
    assert log_in(client).status_code == 200


def test_a_new_password_ends_other_sessions(client: Client, operator: User) -> None:
    log_in(client)
    with changes(actor=None, via="system"):
        operator.set_password("battery staple correct")
        operator.save()

    assert not inside(client)


# -- a second factor ---------------------------------------------------------------------------------------------------


def test_a_login_asks_for_the_second_factor_when_there_is_one(client: Client, operator: User) -> None:
    secret, _ = enrol(operator)

    answer = log_in(client, to="/admin/providers/server/")

    assert answer["Location"] == CODE
    assert not inside(client)
    assert client.get(f"{V1}/servers").status_code == 401
    assert client.get(CODE).status_code == 200
    answer = client.post(CODE, {"code": code_of(secret)})
    assert answer["Location"] == "/admin/providers/server/"
    assert inside(client)
    (entry,) = entries("start_session")
    assert entry.changes == {"by": [None, "password, totp"]}


def test_a_wrong_code_opens_nothing_and_is_recorded(client: Client, operator: User) -> None:
    enrol(operator)
    log_in(client)

    assert client.post(CODE, {"code": "000000"}).status_code == 200

    assert not inside(client)
    assert entries("fail_login")[0].changes["wrong"] == [None, "second factor"]


def test_r18_wrong_codes_count_like_wrong_passwords(client: Client, operator: User) -> None:
    secret, _ = enrol(operator)
    log_in(client)
    statuses = [client.post(CODE, {"code": f"{number:06}"}).status_code for number in range(10)]

    assert statuses == [200] * 9 + [429]
    assert client.post(CODE, {"code": code_of(secret)}).status_code == 429
    assert log_in(Client(), "operator").status_code == 429
    assert not inside(client)


def test_a_code_opens_once(client: Client, operator: User) -> None:
    secret, _ = enrol(operator)
    with time_machine.travel(timezone.now(), tick=False) as clock:
        code = code_of(secret)
        log_in(client)
        client.post(CODE, {"code": code})
        assert inside(client)

        other = Client()
        log_in(other)
        other.post(CODE, {"code": code})
        assert not inside(other)
        clock.shift(30)
        other.post(CODE, {"code": code})
        assert not inside(other)
        other.post(CODE, {"code": code_of(secret)})
        assert inside(other)


@pytest.mark.parametrize("between", ["", " ", "-"])
def test_the_code_that_enrols_an_app_opens_nothing_more(client: Client, operator: User, between: str) -> None:
    other = Client()
    with time_machine.travel(timezone.now(), tick=False) as clock:
        log_in(client)
        client.post("/admin/account/again/", {"password": PASSWORD})
        client.get("/admin/account/app/add/")
        secret = client.session["mfa.totp.secret"]
        code = code_of(secret)
        typed = f"{code[:3]}{between}{code[3:]}"
        assert client.post("/admin/account/app/add/", {"code": typed}).status_code == 302

        log_in(other)
        other.post(CODE, {"code": code})
        assert not inside(other)
        clock.shift(30)
        other.post(CODE, {"code": code_of(secret)})
        assert inside(other)


def test_a_recovery_code_opens_once(client: Client, operator: User) -> None:
    _, codes = enrol(operator)
    for browser, expected in ((client, True), (Client(), False)):
        log_in(browser)
        browser.post(CODE, {"code": codes[0]})
        assert inside(browser) is expected


def test_without_the_password_there_is_no_second_step(client: Client, operator: User) -> None:
    secret, _ = enrol(operator)

    assert client.post(CODE, {"code": code_of(secret)})["Location"] == "/admin/account/login/"
    assert not inside(client)


def test_a_new_password_ends_a_login_that_waits_for_its_code(client: Client, operator: User) -> None:
    secret, codes = enrol(operator)
    log_in(client)
    with changes(actor=None, via="system"):
        operator.set_password("battery staple correct")
        operator.save()

    assert client.post(CODE, {"code": code_of(secret)}).status_code == 403

    assert not inside(client)
    assert client.post(CODE, {"code": codes[0]})["Location"] == "/admin/account/login/"
    log_in(client, password="battery staple correct")
    client.post(CODE, {"code": codes[0]})
    assert inside(client)


def test_what_is_stored_of_a_second_factor_opens_only_with_the_pepper(operator: User, settings: Any) -> None:
    from allauth.mfa.models import Authenticator
    from cryptography.fernet import InvalidToken

    secret, codes = enrol(operator)
    rows = list(Authenticator.objects.filter(user=operator))
    assert secret not in repr([row.data for row in rows])

    settings.PENSTOCK_PEPPERS = {**settings.PENSTOCK_PEPPERS, 99: b"another pepper of 32 bytes at least"}
    assert rows[0].wrap().validate_code(code_of(secret)) or rows[1].wrap().generate_codes() == codes
    settings.PENSTOCK_PEPPERS = {99: b"another pepper of 32 bytes at least"}
    with pytest.raises(InvalidToken):
        next(row for row in rows if row.type == "recovery_codes").wrap().generate_codes()


# -- the same for tokens -----------------------------------------------------------------------------------------------


def token(**more: Any) -> Any:
    return anybody().post(f"{V1}/auth/token", {"username": "operator", "password": PASSWORD, **more})


def test_a_token_needs_the_code_when_a_second_factor_is_enrolled(operator: User) -> None:
    secret, codes = enrol(operator)

    missing, wrong = token(), token(otp="000000")

    assert (missing.status_code, error(missing)["code"]) == (401, "OTP_REQUIRED")
    assert set(error(missing)["details"]) == {"otp"}
    assert (wrong.status_code, error(wrong)["code"]) == (401, "OTP_INVALID")
    assert token(otp=code_of(secret)).status_code == 200
    assert error(token(otp=code_of(secret)))["code"] == "OTP_INVALID"
    assert token(otp=codes[0]).status_code == 200
    assert len(entries("issue_token")) == 2


def test_a_wrong_password_does_not_tell_whether_there_is_a_second_factor(operator: User) -> None:
    enrol(operator)
    answer = token(password="wrong", otp="000000")

    assert error(answer)["code"] == "AUTHENTICATION_REQUIRED"
    assert loads(answer.content)["error"]["details"] == {}


def test_r18_wrong_codes_for_tokens_are_limited(operator: User) -> None:
    secret, _ = enrol(operator)
    statuses = [token(otp=f"{number:06}").status_code for number in range(10)]

    assert statuses == [401] * 9 + [429]
    assert token(otp=code_of(secret)).status_code == 429


def test_somebody_without_a_second_factor_may_send_a_code_all_the_same(operator: User) -> None:
    assert token(otp="").status_code == 200
    assert token(otp="123456").status_code == 200


def test_a_lock_is_forgotten_with_the_daily_tidying(operator: User, client: Client) -> None:
    from config.tasks import forget_logins

    with time_machine.travel(timezone.now(), tick=False) as clock:
        log_in(client)
        clock.shift(timedelta(days=2))
        forget_logins()
    from django.contrib.sessions.models import Session

    assert not Session.objects.exists()
