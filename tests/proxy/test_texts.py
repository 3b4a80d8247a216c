"""What is said with a key that keeps it: sealed before it leaves the worker, and read by administrators alone."""

from __future__ import annotations

import html
import re
import time
import uuid
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from audit.models import Entry
from providers import crypto, keyring, rotation
from providers.errors import CredentialUndecryptable
from providers.fields import raw
from proxy import segments, texts, usage
from proxy.models import TextRecord, UsageRecord
from proxy.spool import Spool, new_attempt_id
from proxy.tasks import purge_texts
from tests.support import answers, faults
from tests.support.api import V1, as_
from tests.support.inprocess import House
from tests.support.records import a_final, a_start
from tests.support.upstream import Upstream

BODY: dict[str, Any] = {
    "messages": [{"role": "system", "content": "be kind"}, {"role": "user", "content": "a question"}]
}


@pytest.fixture
def key(pair: House) -> str:
    """A key that keeps what is said."""
    return pair.issue("recorder", record_text=True)


def kept(house: House) -> dict[str, dict[str, Any]]:
    """The texts in the spool, by attempt, once there is one: they follow the answer."""
    deadline = time.monotonic() + 5
    found: dict[str, dict[str, Any]] = {}
    while not found:
        assert time.monotonic() < deadline
        for path in house.spool_dir.iterdir():
            with path.open("rb") as lines:
                found.update(segments.read(lines).texts)
    return found


def opened(house: House) -> texts.Said:
    """The one text in the spool, opened."""
    house.records(1)
    ((attempt, text),) = kept(house).items()
    row = TextRecord(usage_id=uuid.UUID(attempt), prompt=text["prompt"], answer=text["answer"])
    return texts.read(row)


@pytest.mark.no_database
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "plain"])
def test_a_key_that_says_so_has_its_words_kept_beside_the_record(pair: House, key: str, stream: bool) -> None:
    pair.ask(None, key=key, stream=stream, **BODY)
    assert opened(pair) == ("system: be kind\nuser: a question\n", "".join(answers.words(5)))
    assert set(kept(pair)) == {record["id"] for record in pair.records()}


@pytest.mark.no_database
def test_no_other_key_has_anything_kept(pair: House, key: str) -> None:
    pair.ask(None, stream=True, **BODY)
    pair.ask(None, **BODY)
    pair.ask(None, key=key, **BODY)
    assert set(kept(pair)) == {pair.records(3)[-1]["id"]}


@pytest.mark.no_database
def test_r54_the_spool_has_sealed_text_only(pair: House, key: str, upstream: Upstream) -> None:
    upstream.behave(answers.ok(texts=["CANARY-", "ANSWER"]))
    pair.ask(None, key=key, stream=True, messages=[{"role": "user", "content": "CANARY-QUESTION"}])
    assert opened(pair) == ("user: CANARY-QUESTION\n", "CANARY-ANSWER")
    assert not [path for path in pair.spool_dir.iterdir() if b"CANARY" in path.read_bytes()]


@pytest.mark.no_database
def test_what_came_before_a_break_or_the_callers_leaving_is_kept(
    pair: House, key: str, upstream: Upstream
) -> None:
    upstream.behave(faults.reset_after(3))
    pair.ask("first/tiny", key=key, stream=True)
    assert opened(pair).answer == "".join(answers.words(3))


@pytest.mark.no_database
def test_a_caller_who_left_has_his_part_kept(pair: House, key: str, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=200, delay=0.05))
    body = {"messages": BODY["messages"], "stream": True}
    with httpx.stream(
        "POST", f"{pair.url}/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"}
    ) as answer:
        lines = (line for line in answer.iter_lines() if "word1 " in line)
        next(lines)
    assert opened(pair).answer.startswith("word1 ")
    assert pair.records()[0]["status"] == "client_disconnected"


@pytest.mark.no_database
def test_a_request_that_nobody_answered_is_kept_beside_its_last_attempt(
    pair: House, key: str, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(answers.status(500))
    fallback.behave(answers.status(400))
    pair.ask(None, key=key)
    records = pair.records(2)
    assert set(kept(pair)) == {records[-1]["id"]}
    assert opened(pair) == ("user: hello there\n", "")


@pytest.mark.no_database
def test_both_are_cut_at_their_size_and_say_so(pair: House, key: str, upstream: Upstream) -> None:
    upstream.behave(answers.ok(texts=["ö" * 700] * 30))
    pair.ask(None, key=key, stream=True, messages=[{"role": "user", "content": '"\n' * 100_000}])
    said = opened(pair)
    for text in said:
        assert texts.MAX_TEXT_BYTES - 8 < len(text.encode()) <= texts.MAX_TEXT_BYTES and text.endswith(
            " [cut]"
        )


@pytest.mark.no_database
def test_tools_pictures_and_reasoning_are_told_in_words(pair: House, key: str, upstream: Upstream) -> None:
    upstream.behave(answers.ok(reasoning=["hm "], tool=("weather", ['{"in":', '"Ulm"}'])))
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    asked = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}],
    }
    pair.ask(None, key=key, stream=True, messages=[{"role": "user", "content": [picture]}, asked])
    assert opened(pair) == ("user: [image_url]\nassistant: f({})\n", 'hm weather{"in":"Ulm"}')


@pytest.mark.no_database
@pytest.mark.parametrize("content", [7, {"a": 1}, [1, None, {"text": 5}]])
def test_no_shape_of_a_request_is_an_error(pair: House, key: str, content: Any) -> None:
    message = {"role": "user", "content": content, "tool_calls": content}
    assert pair.ask(None, key=key, messages=[message]).status_code == 200
    assert opened(pair).prompt.startswith("user: ")


# -- in the database


@pytest.fixture
def ring(db: None) -> crypto.Keyring:
    return keyring.ensure()


@pytest.fixture
def spool(tmp_path: Path, ring: crypto.Keyring) -> Iterator[Spool]:
    spool = Spool(tmp_path / "spool", segment_seconds=0)
    yield spool
    spool.close()


def a_said_attempt(spool: Spool, answer: str = "an answer", **final: Any) -> uuid.UUID:
    key = new_attempt_id()
    spool.start(a_start(key))
    spool.finish(a_final(key, **final))
    texts.keep(spool, key, BODY, answer)
    return uuid.UUID(key)


def drained(spool: Spool) -> list[TextRecord]:
    spool.tick()
    usage.drain(spool.directory)
    return list(TextRecord.objects.all())


def test_the_drainer_puts_a_text_beside_its_record(spool: Spool) -> None:
    key = a_said_attempt(spool)
    (row,) = drained(spool)
    assert row.pk == key and row.usage.gateway_key == "shop"
    assert texts.read(row) == ("system: be kind\nuser: a question\n", "an answer")
    assert row.data_key == crypto.current_keyring().primary


def test_a_text_that_comes_after_its_records_segment_finds_it(spool: Spool) -> None:
    key = new_attempt_id()
    spool.start(a_start(key))
    spool.finish(a_final(key))
    assert drained(spool) == []
    texts.keep(spool, key, BODY, "late")
    (row,) = drained(spool)
    assert texts.read(row).answer == "late"


def test_a_text_without_a_record_or_in_clear_is_not_taken(spool: Spool) -> None:
    texts.keep(spool, new_attempt_id(), BODY, "nobody's")  # there is no segment yet
    known = a_said_attempt(spool)
    texts.keep(spool, new_attempt_id(), BODY, "nobody's")
    spool.keep({"id": known.hex, "prompt": "in clear", "answer": "in clear"})
    spool.keep({"id": known.hex, "prompt": "v1.a.\0", "answer": "v1.a.\0"})
    spool.keep({"id": known.hex, "prompt": "v1.a." + "A" * texts.MAX_SEALED, "answer": "v1.a.A"})
    spool.keep({"id": "no id", "prompt": "x", "answer": "y"})
    assert drained(spool) == []
    assert UsageRecord.objects.count() == 1


def test_a_text_that_comes_twice_is_there_once(spool: Spool) -> None:
    key = a_said_attempt(spool)
    drained(spool)
    texts.keep(spool, key.hex, BODY, "again")
    (row,) = drained(spool)
    assert texts.read(row).answer == "an answer"


def test_deleting_the_record_deletes_its_text(spool: Spool) -> None:
    one, two = a_said_attempt(spool), a_said_attempt(spool)
    assert len(drained(spool)) == 2
    UsageRecord.objects.filter(pk=one).delete()
    assert [row.pk for row in TextRecord.objects.all()] == [two]


def test_a_text_opens_for_its_own_row_alone(spool: Spool) -> None:
    one, two = a_said_attempt(spool), a_said_attempt(spool)
    drained(spool)
    stolen = TextRecord.objects.get(pk=one)
    TextRecord.objects.filter(pk=two).update(prompt=stolen.prompt, answer=stolen.answer)
    with pytest.raises(CredentialUndecryptable):
        texts.read(TextRecord.objects.get(pk=two))
    TextRecord.objects.filter(pk=one).update(prompt=stolen.answer, answer=stolen.prompt)
    with pytest.raises(CredentialUndecryptable):
        texts.read(TextRecord.objects.get(pk=one))


def test_texts_are_forgotten_after_their_days_and_records_stay(spool: Spool, settings: Any) -> None:
    settings.TEXT_RETENTION_DAYS = 3
    old, young = a_said_attempt(spool), a_said_attempt(spool)
    drained(spool)
    TextRecord.objects.filter(pk=old).update(created_at=timezone.now() - timedelta(days=3, seconds=1))
    TextRecord.objects.filter(pk=young).update(created_at=timezone.now() - timedelta(days=3, seconds=-60))
    purge_texts()
    assert [row.pk for row in TextRecord.objects.all()] == [young]
    assert UsageRecord.objects.count() == 2


def test_a_purge_reads_no_texts_and_goes_on_where_a_batch_ends(
    spool: Spool, settings: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr("proxy.tasks.PURGE_BATCH", 2)
    for _ in range(5):
        a_said_attempt(spool)
    drained(spool)
    TextRecord.objects.update(created_at=timezone.now() - timedelta(days=4000))
    seen: list[str] = []

    def listen(execute: Any, sql: str, *rest: Any) -> Any:
        seen.append(sql)
        return execute(sql, *rest)

    with connection.execute_wrapper(listen):
        purge_texts()
    assert TextRecord.objects.count() == 0
    assert not [sql for sql in seen if sql.startswith("SELECT") and "answer" in sql]


def test_the_purge_is_scheduled(settings: Any) -> None:
    assert "proxy.tasks.purge_texts" in {each["task"] for each in settings.CELERY_BEAT_SCHEDULE.values()}


# -- rotation


def test_texts_are_rewrapped_and_the_old_key_goes_only_then(spool: Spool) -> None:
    for number in range(5):
        a_said_attempt(spool, f"answer {number}")
    before = {row.pk: raw(row.prompt) for row in drained(spool)}
    old = crypto.current_keyring().primary

    new = rotation.new_key()
    keyring.current()
    assert rotation.status().values == {old: 5, new: 0}
    with pytest.raises(rotation.RotationRefused, match=r"5 values .* 5 of proxy\.TextRecord"):
        rotation.retire(wait=lambda seconds: None)

    told: list[int] = []
    assert rotation.rewrap(batch=2, tell=told.append) == rotation.Rewrapped(5, ())
    assert told[-1] == 5
    assert rotation.retire(wait=lambda seconds: None) == [old]
    rows = list(TextRecord.objects.all())
    assert {row.data_key for row in rows} == {new}
    assert sorted(texts.read(row).answer for row in rows) == [f"answer {number}" for number in range(5)]
    assert all(raw(row.prompt) != before[row.pk] for row in rows)


def test_a_text_that_does_not_open_is_named_by_rewrap_and_doctor(spool: Spool, capsys: Any) -> None:
    broken, well = a_said_attempt(spool), a_said_attempt(spool)
    drained(spool)
    stored = raw(TextRecord.objects.get(pk=broken).answer)
    TextRecord.objects.filter(pk=broken).update(
        answer=stored[:-6] + ("A" if stored[-6] != "A" else "B") + stored[-5:]
    )
    with pytest.raises(SystemExit):
        call_command("doctor")
    assert f"proxy.TextRecord {broken.hex}" in capsys.readouterr().out
    rotation.new_key()
    result = rotation.rewrap()
    assert (result.count, [str(each) for each in result.failed]) == (
        1,
        [f"proxy.TextRecord {broken.hex} text"],
    )
    assert texts.read(TextRecord.objects.get(pk=well)).answer == "an answer"


# -- who reads them


def browser(person: User) -> Client:
    client = Client()
    client.force_login(person)
    return client


@pytest.fixture
def said(spool: Spool) -> uuid.UUID:
    """An attempt whose text is in the database; its id."""
    key = a_said_attempt(spool, "a secret <b>answer</b>")
    drained(spool)
    return key


def address(key: uuid.UUID) -> str:
    return reverse("admin:proxy_usagerecord_text", args=[key])


def test_an_administrator_reads_it_and_the_audit_log_says_so_each_time(owner: User, said: uuid.UUID) -> None:
    client = browser(owner)
    page = client.get(reverse("admin:proxy_usagerecord_change", args=[said])).content.decode()
    assert "a secret" not in page and address(said) in page
    for times in (1, 2):
        answer = client.post(address(said))
        shown = html.unescape(re.sub(r"<[^>]*>", " ", answer.content.decode()))
        assert "a secret <b>answer</b>" in shown and "user: a question" in shown
        assert "no-store" in answer["cache-control"]
        entries = Entry.objects.filter(action="read_text", entity_id=str(said))
        assert [(each.username, each.via) for each in entries] == [("owner", "admin")] * times
    assert "secret" not in str(list(Entry.objects.values()))


def test_looking_at_its_address_shows_and_records_nothing(owner: User, said: uuid.UUID) -> None:
    answer = browser(owner).get(address(said))
    assert answer.status_code == 302 and not Entry.objects.filter(action="read_text").exists()


@pytest.mark.parametrize("role", ["operator", "viewer", "stranger"])
def test_nobody_else_reads_it_or_is_told_that_it_is_there(request: Any, role: str, said: uuid.UUID) -> None:
    client = browser(request.getfixturevalue(role))
    answer = client.post(address(said))
    assert answer.status_code in (302, 403) and b"a secret" not in answer.content
    page = client.get(reverse("admin:proxy_usagerecord_change", args=[said]))
    assert address(said) not in page.content.decode()
    assert not Entry.objects.filter(action="read_text").exists()


def test_a_record_without_a_text_has_no_such_page(owner: User, spool: Spool) -> None:
    key = new_attempt_id()
    spool.start(a_start(key))
    spool.finish(a_final(key))
    drained(spool)
    pk = uuid.UUID(key)
    client = browser(owner)
    assert client.post(address(pk)).status_code == 404
    page = client.get(reverse("admin:proxy_usagerecord_change", args=[pk])).content.decode()
    assert address(pk) not in page


def test_a_text_that_does_not_open_says_why(owner: User, said: uuid.UUID) -> None:
    TextRecord.objects.update(answer=raw(TextRecord.objects.get().prompt))
    page = browser(owner).post(address(said)).content.decode()
    assert "belongs elsewhere" in page and "a question" not in page


def test_the_key_says_clearly_that_it_keeps_what_is_said(owner: User) -> None:
    api, client = as_(owner), browser(owner)
    made = api.post(f"{V1}/gateway-keys", {"name": "desk", "record_text": True}).json()
    assert made["record_text"] is True
    page = client.get(reverse("admin:proxy_gatewaykey_change", args=[made["id"]])).content.decode()
    assert "administrators can read it" in page
    assert "keeps what is said" in client.get(reverse("admin:proxy_gatewaykey_changelist")).content.decode()
    entry = Entry.objects.get(action="add_gateway_key")
    assert entry.changes["record_text"] == [None, True]
    api.patch(f"{V1}/gateway-keys/{made['id']}", {"record_text": False})
    assert Entry.objects.latest("seq").changes == {"record_text": [True, False]}


def test_a_new_key_keeps_nothing(owner: User) -> None:
    made = as_(owner).post(f"{V1}/gateway-keys", {"name": "desk"}).json()
    assert (made["record_text"], made["cache_seconds"], made["cache_emptied_at"]) == (False, None, None)
