"""Changing the keys that secrets are sealed under: online, resumable, and never locking anybody out."""

from __future__ import annotations

import base64
import json
import random
import secrets
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib import auth
from django.contrib.auth.models import User
from django.core.management import CommandError, call_command
from django.http import HttpRequest
from django.test import Client

from audit.changes import changes
from audit.models import Entry
from audit.verify import verify
from providers import crypto, health, keyring, keys, rotation
from providers.fields import raw
from providers.models import ApiKey, Keyring, Provider
from tests.support.gateway import Gateway
from tests.support.processes import REPOSITORY
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("ring")]

Provide = Callable[..., Provider]


def never_wait(seconds: float) -> None:
    assert 0 <= seconds <= rotation.SETTLE.total_seconds()


@pytest.fixture
def sealed(provide: Provide) -> list[ApiKey]:
    """Seven keys of seven providers; the value of each is its name's."""
    for number in range(7):
        provide(
            f"p{number}", f"http://127.0.0.1:{1000 + number}/v1", api_key=f"value-of-p{number}-0123456789"
        )
    return list(ApiKey.objects.select_related("provider").order_by("pk"))


def assert_all_open() -> None:
    for key in ApiKey.objects.select_related("provider"):
        assert keys.opened(key).reveal() == f"value-of-{key.provider.name}-0123456789"


def under() -> set[str]:
    return {keyring.sealed_under(key) for key in ApiKey.objects.all()}


def test_all_sealed_columns_are_known_to_the_rotation() -> None:
    """Whoever adds one must teach the rotation about it. The canary goes with the keyring; a gateway key's is a hash."""
    from django.apps import apps

    from providers.fields import SealedField

    columns = {
        f"{model._meta.label}.{field.name}"
        for model in apps.get_models()
        if not model._meta.proxy
        for field in model._meta.concrete_fields
        if isinstance(field, SealedField) and "hmac" not in field.name
    }
    assert columns == {
        "providers.ApiKey.secret",
        "providers.Keyring.canary",
        "proxy.TextRecord.prompt",
        "proxy.TextRecord.answer",
    }


def test_the_three_steps_leave_everything_under_one_new_key(sealed: list[ApiKey]) -> None:
    (old,) = under()
    new = rotation.new_key()
    assert new != old
    assert under() == {old}
    assert_all_open()
    assert rotation.rewrap(batch=3) == rotation.Rewrapped(7, ())
    assert under() == {new}
    assert_all_open()
    assert rotation.retire(wait=never_wait) == [old]
    assert set(keyring.load().keys) == {new}
    assert_all_open()


def test_each_batch_is_one_entry_and_no_row_gets_a_new_version(sealed: list[ApiKey]) -> None:
    rotation.new_key()
    before = list(ApiKey.objects.order_by("pk").values("pk", "version", "updated_at", "fingerprint", "last4"))
    start = Entry.objects.latest("seq").seq
    rotation.rewrap(batch=3)
    entries = list(Entry.objects.filter(seq__gt=start).order_by("seq"))
    assert [(entry.action, entry.via) for entry in entries] == [("rewrap_keyring", "command")] * 3
    told = [pk for entry in entries for pk in entry.changes["providers.ApiKey.secret"][1]]
    assert told == [key.pk for key in sealed]
    assert "v1." not in str([entry.changes for entry in Entry.objects.all()])
    assert (
        list(ApiKey.objects.order_by("pk").values("pk", "version", "updated_at", "fingerprint", "last4"))
        == before
    )


def test_a_second_rewrap_has_nothing_to_do(sealed: list[ApiKey]) -> None:
    rotation.new_key()
    rotation.rewrap()
    start = Entry.objects.latest("seq")
    assert rotation.rewrap().count == 0
    assert Entry.objects.latest("seq") == start


def test_a_value_that_was_replaced_meanwhile_is_left_alone(sealed: list[ApiKey]) -> None:
    rotation.new_key()
    stale = rotation._batch(0, 100)
    with changes(actor=None, via="system"):
        keys.write_default(Provider.objects.get(name="p3"), "a-newer-value-0123456789")
    assert rotation._rewrap_batch(stale, []) == 6
    assert keys.opened(ApiKey.objects.get(provider__name="p3")).reveal() == "a-newer-value-0123456789"


def test_a_batch_that_fails_half_way_changes_nothing(sealed: list[ApiKey]) -> None:
    rotation.new_key()
    before = list(ApiKey.objects.values_list("pk", "secret"))
    with pytest.raises(ZeroDivisionError), changes(actor=None, via="command"):  # noqa: PT012 - the whole block is what is undone
        rotation._rewrap_batch(rotation._batch(0, 100), [])
        raise ZeroDivisionError
    assert [(pk, raw(value)) for pk, value in ApiKey.objects.values_list("pk", "secret")] == [
        (pk, raw(value)) for pk, value in before
    ]


def test_retire_refuses_while_a_row_needs_the_key_and_names_it(sealed: list[ApiKey]) -> None:
    rotation.new_key()
    with pytest.raises(rotation.RotationRefused, match=rf"7 values .*providers.ApiKey {sealed[0].pk} secret"):
        rotation.retire(wait=never_wait)
    assert len(keyring.load().keys) == 2


def test_retire_waits_until_every_process_knows_the_rewrapped_values(sealed: list[ApiKey]) -> None:
    waits: list[float] = []
    rotation.new_key()
    rotation.rewrap()
    rotation.retire(wait=waits.append)
    assert 5 < waits[0] <= rotation.SETTLE.total_seconds()


def test_values_that_do_not_open_are_named_and_left_as_they_are(
    sealed: list[ApiKey], capsys: pytest.CaptureFixture[str]
) -> None:
    bad = sealed[2]
    (old,) = under()
    ApiKey.objects.filter(pk=bad.pk).update(secret=f"v1.{old}.AAAA")
    rotation.new_key()
    with pytest.raises(CommandError, match="1 values do not open"):
        call_command("rotate_keys", "rewrap")
    assert f"providers.ApiKey {bad.pk} secret (p2 / default)" in capsys.readouterr().err
    assert raw(ApiKey.objects.get(pk=bad.pk).secret) == f"v1.{old}.AAAA"
    with pytest.raises(rotation.RotationRefused, match=f"ApiKey {bad.pk} secret"):
        rotation.retire(wait=never_wait)
    with changes(actor=None, via="system"):
        keys.write_default(Provider.objects.get(name="p2"), "value-of-p2-0123456789")
    rotation.retire(wait=never_wait)
    assert_all_open()


def test_the_encryption_key_is_changed_in_steps_and_processes_start_with_either_meanwhile(
    sealed: list[ApiKey], settings: Any
) -> None:
    old, new = settings.PENSTOCK_ENCRYPTION_KEY, secrets.token_bytes(32)
    settings.PENSTOCK_NEW_ENCRYPTION_KEY = new
    rotation.new_key()
    for key in (old, new):
        settings.PENSTOCK_ENCRYPTION_KEY, settings.PENSTOCK_NEW_ENCRYPTION_KEY = key, b""
        keyring.load()
        assert_all_open()
    assert rotation.status().foreign == 1
    with pytest.raises(rotation.RotationRefused, match="run retire first"):
        rotation.new_key()
    rotation.rewrap()
    rotation.retire(wait=never_wait)
    assert (rotation.status().wraps, rotation.status().foreign) == (1, 0)
    settings.PENSTOCK_ENCRYPTION_KEY = old
    with pytest.raises(keyring.WrongEncryptionKey):
        keyring.load()


def test_the_status_counts_what_is_under_each_key(
    sealed: list[ApiKey], capsys: pytest.CaptureFixture[str]
) -> None:
    (old,) = under()
    call_command("rotate_keys", "new")
    new = Keyring.objects.get().primary_kid
    capsys.readouterr()
    call_command("rotate_keys", "--status")
    lines = capsys.readouterr().out.splitlines()
    assert f"data key {old} (older): 7 values" in lines
    assert f"data key {new} (primary): 0 values" in lines


def test_fingerprints_are_the_same_before_and_after(sealed: list[ApiKey]) -> None:
    before = set(ApiKey.objects.values_list("fingerprint", flat=True))
    rotation.new_key()
    rotation.rewrap()
    rotation.retire(wait=never_wait)
    ring = keyring.load()
    assert {ring.fingerprint(f"value-of-p{number}-0123456789") for number in range(7)} == before


def test_r07_sessions_outlive_a_change_of_keys(sealed: list[ApiKey], owner: User) -> None:
    client = Client()
    client.force_login(owner, backend="django.contrib.auth.backends.ModelBackend")
    rotation.new_key()
    rotation.rewrap()
    rotation.retire(wait=never_wait)
    request = HttpRequest()
    request.session = client.session
    assert auth.get_user(request) == owner


# -- what is wrong with what is stored ---------------------------------------------------------------------------------


def doctor(capsys: pytest.CaptureFixture[str]) -> tuple[int, list[dict[str, Any]]]:
    """Exit code and findings."""
    capsys.readouterr()
    try:
        call_command("doctor", "--json")
        code = 0
    except SystemExit as ended:
        code = int(ended.code or 0)
    return code, json.loads(capsys.readouterr().out)["findings"]


def test_r06_the_doctor_is_content_with_what_opens(
    sealed: list[ApiKey], capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor(capsys) == (0, [])


def test_r02_swapped_ciphertexts_open_for_neither_row_and_reach_nobody(
    provide: Provide, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    with Upstream() as other:
        first = provide("first", f"{upstream.url}/v1", api_key="sk-of-the-first-0123456789")
        second = provide("second", f"{other.url}/v1", api_key="sk-of-the-second-0123456789")
        one, two = ApiKey.objects.get(provider=first), ApiKey.objects.get(provider=second)
        ApiKey.objects.filter(pk=one.pk).update(secret=two.secret)
        ApiKey.objects.filter(pk=two.pk).update(secret=one.secret)
        assert [health.probe_now(each).status for each in (first, second)] == ["error", "error"]
        assert not upstream.ledger.records
        assert not other.ledger.records
    code, findings = doctor(capsys)
    assert code == 1
    assert [(each["model"], each["pk"], each["field"]) for each in findings] == [
        ("providers.ApiKey", key.pk, "secret") for key in (one, two)
    ]


def test_r02_a_base_url_that_was_changed_in_the_database_gets_no_key(
    provide: Provide, upstream: Upstream
) -> None:
    provider = provide("first", "https://api.example.com/v1", api_key="sk-of-the-first-0123456789")
    Provider.objects.filter(pk=provider.pk).update(base_url=f"{upstream.url}/v1")
    assert health.probe_now(Provider.objects.get(pk=provider.pk)).status == "error"
    assert not upstream.ledger.records


def test_r03_one_flipped_bit_harms_one_provider_only(
    provide: Provide, upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = provide("broken", f"{upstream.url}/v1", api_key="sk-of-the-first-0123456789")
    well = provide("well", f"{upstream.url}/v1", api_key="sk-of-the-second-0123456789")
    key = ApiKey.objects.get(provider=broken)
    head, _, blob = raw(key.secret).rpartition(".")
    data = bytearray(base64.urlsafe_b64decode(blob))
    data[len(data) // 2] ^= 4
    ApiKey.objects.filter(pk=key.pk).update(secret=f"{head}.{base64.urlsafe_b64encode(data).decode()}")
    assert [health.probe_now(each).status for each in (broken, well)] == ["error", "online"]
    code, findings = doctor(capsys)
    assert (code, [each["pk"] for each in findings]) == (1, [key.pk])


def test_r06_the_doctor_tells_of_a_keyring_that_does_not_open(
    sealed: list[ApiKey], capsys: pytest.CaptureFixture[str], settings: Any
) -> None:
    settings.PENSTOCK_ENCRYPTION_KEY = secrets.token_bytes(32)
    code, findings = doctor(capsys)
    assert (code, [each["what"] for each in findings]) == (1, ["keyring"])


def test_the_doctor_prints_no_secret(sealed: list[ApiKey], capsys: pytest.CaptureFixture[str]) -> None:
    ApiKey.objects.update(secret="v1.00000000.AAAA")
    with pytest.raises(SystemExit):
        call_command("doctor")
    said = capsys.readouterr().out
    assert f"providers.ApiKey {sealed[0].pk} secret (p0 / default): " in said
    assert said.endswith("7 problems\n")
    assert "value-of" not in said
    assert "AAAA" not in said


# -- R05: with processes as they are really started --------------------------------------------------------------------

MANY = """
from audit.changes import changes
from providers import keys
from providers.models import Provider
with changes(actor=None, via="command"):
    for n in range({count}):
        provider = Provider.objects.create(name=f"p{{n}}", base_url=f"http://127.0.0.1:9/{{n}}")
        keys.write_default(provider, f"value-of-p{{n}}-0123456789")
"""


def kill_at(gateway: Gateway, line: int) -> bool:
    """Run rewrap, one row at a time, and kill it -9 once it has said so many lines. Whether it was still at work."""
    command = [sys.executable, "manage.py", "rotate_keys", "rewrap", "--batch", "1"]
    env = {**gateway.env, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=REPOSITORY, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(line):
            process.stdout.readline()
        working = process.poll() is None
        process.kill()
    return working


@pytest.mark.timeout(240)
def test_r05_keys_are_changed_under_load_with_kills_and_no_request_fails() -> None:
    """The whole change: a new data key and a new encryption key, the rewrap killed at random rows."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    choose = random.Random(seed)
    new = base64.urlsafe_b64encode(secrets.token_bytes(32)).decode()
    with Upstream() as upstream, Gateway() as gateway:
        gateway.shell(MANY.format(count=40))
        key = gateway.provide(f"{upstream.url}/v1", api_key="sk-in-use-0123456789")
        old = gateway.env["PENSTOCK_ENCRYPTION_KEY"]
        with Load(gateway, key) as load:
            gateway.manage("rotate_keys", "new", env={"PENSTOCK_NEW_ENCRYPTION_KEY": new})
            kills = [kill_at(gateway, choose.randint(1, 12)) for _ in range(3)]
            assert all(kills)
            assert "done: " in gateway.manage("rotate_keys", "rewrap")
            # The web process still has the old encryption key alone; retiring that comes after its restart.
        assert load.answers.count(200) > 20
        assert set(load.answers) == {200}
        gateway.env["PENSTOCK_ENCRYPTION_KEY"] = new
        gateway.restart()
        with Load(gateway, key) as load:
            gateway.manage("rotate_keys", "retire")
        assert set(load.answers) == {200}
        said = gateway.manage("rotate_keys", "--status")
        assert "(older)" not in said
        assert "41 values" in said
        gateway.manage("doctor")
        gateway.manage("verify_audit")
        assert {record.headers["authorization"] for record in upstream.ledger.records} == {
            "Bearer sk-in-use-0123456789"
        }
        gateway.halt()
        refused = gateway.run_manage("serve", env={"PENSTOCK_ENCRYPTION_KEY": old})
        assert refused.returncode != 0
        assert "PENSTOCK_ENCRYPTION_KEY" in refused.stderr


class Load:
    """Chats, one after the other, in a thread; `answers` are the status codes."""

    def __init__(self, gateway: Gateway, key: str) -> None:
        self.answers: list[int] = []
        self._gateway, self._key = gateway, key
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        body = {"model": "tiny", "messages": [{"role": "user", "content": "hello"}]}
        with self._gateway.client(self._key) as client:
            while not self._stop.wait(0.05):
                self.answers.append(client.post("/v1/chat/completions", json=body).status_code)


def test_the_log_of_a_rotation_is_whole(sealed: list[ApiKey], tmp_path: Any) -> None:
    rotation.new_key()
    rotation.rewrap(batch=2)
    rotation.retire(wait=never_wait)
    assert verify(tmp_path / "none").ok
    assert crypto.key_id(raw(Keyring.objects.get().canary)) == keyring.current().primary
