"""Finding what was done to the log by somebody who has the database."""

from __future__ import annotations

import json
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command
from django.db import connection
from hypothesis import HealthCheck, example, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from audit import tasks
from audit.chain import GENESIS, link
from audit.changes import Identity, changes, current
from audit.models import Entry, Head
from audit.triggers import lift_triggers, set_triggers
from audit.verify import Report, head_problem, missing_triggers, read_anchors, verify, write_anchor
from providers.models import Provider
from tests.support.api import add_server, as_

pytestmark = pytest.mark.django_db


@pytest.fixture
def anchors(tmp_path: Path, settings: Any) -> Path:
    settings.AUDIT_ANCHOR_FILE = tmp_path / "anchors.log"
    return tmp_path / "anchors.log"


@pytest.fixture
def log(anchors: Path) -> Iterator[list[int]]:
    """Six entries; their numbers. The triggers are away, as for somebody who owns the database."""
    for number in range(6):
        with changes(actor=None, via="system"):
            Provider.objects.create(name=f"p{number}", base_url="http://127.0.0.1:1")
    lift_triggers(connection)
    yield list(Entry.objects.order_by("seq").values_list("seq", flat=True))[-6:]
    set_triggers(connection)


def problems() -> tuple[str, ...]:
    return verify().problems


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        ("2001:DB8::1", "2001:db8::1"),
        ("::ffff:10.1.2.3", "10.1.2.3"),
        ("fe80::1%eth0", "fe80::1"),
        ("unknown", None),
        ("", None),
    ],
)
def test_an_address_is_hashed_in_the_form_that_is_kept(owner: User, told: str, kept: str | None) -> None:
    client = as_(owner)
    client.defaults["REMOTE_ADDR"] = told
    add_server(client, name="addressed")
    assert Entry.objects.get(entity_name="addressed").ip == kept
    assert verify().ok


def rechain(start: int) -> None:
    """Compute all hashes from `start` on anew, and the head's, as a careful forger would."""
    before = Entry.objects.filter(seq__lt=start).order_by("-seq").first()
    digest = before.hash if before else GENESIS
    for entry in Entry.objects.filter(seq__gte=start).order_by("seq"):
        digest = link(digest, entry)
        Entry.objects.filter(pk=entry.pk).update(hash=digest)
    Head.objects.update(hash=digest, seq=Entry.objects.latest("seq").seq)


def test_a_log_that_nobody_touched_is_whole(log: list[int]) -> None:
    report = verify()
    assert report == Report(Entry.objects.count(), log[-1], Head.objects.get().hash, ())
    assert report.ok


def test_an_empty_log_is_whole(anchors: Path) -> None:
    assert verify().ok


numbers = (
    st.floats(allow_nan=False, allow_infinity=False)
    | st.integers()
    | st.integers(-300, 300).map(lambda exponent: 10.0**exponent)
)
values = st.recursive(
    st.none() | st.booleans() | numbers | st.text(st.characters(exclude_categories=["Cs"], min_codepoint=1)),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text('aéB"\\', max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@bounds(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(values, min_size=1, max_size=20))
@example([1e16, 1e22, 1e23, 1e300, 1.7976931348623157e308, -1e16, 123456789012345678.0, 9999999999999998.0])
@example([1.0, 0.0, -0.0, 1e15, 0.1, 1e-7, 1e-320, 5e-324, 2**64, -(10**40), 100.0, 1.5e-05])
def test_whatever_json_was_recorded_is_whole_in_every_database(anchors: Path, made: list[Any]) -> None:
    with changes(actor=None, via="system"):
        current().add(verb="add", identity=Identity("x", "1", "x", "x"), changes={"a": [None, {"b": made}]})
    assert problems() == ()


@pytest.mark.parametrize("fields", [{"metadata": {"x": 1e16}}, {"metadata": {"x": -0.0}}])
def test_a_server_with_any_number_leaves_the_log_whole(
    anchors: Path, operator: User, fields: dict[str, Any]
) -> None:
    add_server(as_(operator), **fields)
    assert problems() == ()


@pytest.mark.parametrize("field", [{"username": "eve"}, {"changes": {}}, {"action": "x"}, {"entity_id": "9"}])
def test_an_edit_is_found(log: list[int], field: dict[str, Any]) -> None:
    Entry.objects.filter(seq=log[2]).update(**field)
    assert problems() == (f"entry {log[2]} is not what was written, or not where it was written",)


def test_an_edit_with_its_own_hash_made_anew_is_found_at_the_next(log: list[int]) -> None:
    entry = Entry.objects.get(seq=log[2])
    entry.username = "eve"
    before = Entry.objects.filter(seq__lt=log[2]).order_by("-seq").first()
    Entry.objects.filter(seq=log[2]).update(
        username="eve", hash=link(before.hash if before else GENESIS, entry)
    )
    assert [text.split()[1] for text in problems()] == [str(log[3])]


def test_a_deletion_is_found(log: list[int]) -> None:
    Entry.objects.filter(seq__in=log[2:4]).delete()
    assert f"entries {log[2]} to {log[3]} are missing" in problems()


def test_reordering_is_found(log: list[int]) -> None:
    one, two = log[1], log[2]
    Entry.objects.filter(seq=one).update(seq=-1)
    Entry.objects.filter(seq=two).update(seq=one)
    Entry.objects.filter(seq=-1).update(seq=two)
    found = problems()
    assert any(f"entry {one} " in text for text in found)
    assert any(f"entry {two} " in text for text in found)


def test_a_cut_off_end_is_found_by_the_head(log: list[int]) -> None:
    Entry.objects.filter(seq__gt=log[3]).delete()
    assert problems() == (f"the head says {log[-1]}, but the last entry is {log[3]}",)
    assert head_problem()


def test_a_cut_off_end_with_a_forged_head_is_found_by_the_anchors(log: list[int]) -> None:
    tasks.anchor_head()
    Entry.objects.filter(seq__gt=log[3]).delete()
    rechain(log[3])
    assert not head_problem()
    assert problems() == (f"entry {log[-1]} was anchored, but the log ends at {log[3]}",)


def test_a_history_that_was_forged_as_a_whole_is_found_by_the_anchors(log: list[int]) -> None:
    tasks.anchor_head()
    Entry.objects.filter(seq=log[1]).update(username="eve")
    rechain(log[1])
    assert problems() == (f"entry {log[-1]} is not the one that was anchored",)


def test_entries_beyond_the_head_are_found(log: list[int]) -> None:
    Head.objects.update(seq=log[3], hash=Entry.objects.get(seq=log[3]).hash)
    assert problems() == (f"there are entries after the head ({log[3]})",)


def test_a_lost_head_is_found(log: list[int]) -> None:
    Head.objects.all().delete()
    assert problems()
    assert head_problem()


# -- anchors -----------------------------------------------------------------------------------------------------------


def test_the_anchor_is_written_when_there_is_something_new_and_for_us_alone(
    log: list[int], anchors: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="audit.tasks"):
        tasks.anchor_head()
        tasks.anchor_head()
    head = Head.objects.get()
    lines = anchors.read_text().splitlines()
    assert [line.split()[1:] for line in lines] == [[str(head.seq), head.hash]]
    assert stat.S_IMODE(anchors.stat().st_mode) == 0o600
    assert [record.getMessage() for record in caplog.records] == [f"audit head is {head.seq} {head.hash}"]
    with changes(actor=None, via="system"):
        Provider.objects.create(name="more", base_url="http://127.0.0.1:1")
    tasks.anchor_head()
    assert len(anchors.read_text().splitlines()) == 2
    assert verify().ok


def test_a_torn_or_foreign_line_is_left_out_and_the_first_word_counts(tmp_path: Path) -> None:
    path = tmp_path / "anchors"
    good, other = "a" * 64, "b" * 64
    path.write_text(f"t 1 {good}\nt 1 {other}\nt x {good}\n\nt 2 {good[:10]}\nt 3 {good}\nt 4 aa")
    assert read_anchors(path) == {1: good, 3: good}
    assert read_anchors(tmp_path / "none") == {}


def test_an_anchor_file_may_be_brought_along(log: list[int], tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere.log"
    assert write_anchor(elsewhere) is not None
    assert write_anchor(elsewhere) is None
    Entry.objects.filter(seq__gt=log[3]).delete()
    rechain(log[3])
    assert verify().ok
    with pytest.raises(SystemExit):
        call_command("verify_audit", anchors=elsewhere)


# -- doors -------------------------------------------------------------------------------------------------------------


def test_the_command_ends_with_1_and_says_what_is_wrong(
    log: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    call_command("verify_audit")
    assert f"{Entry.objects.count()} entries are whole" in capsys.readouterr().out
    Entry.objects.filter(seq=log[0]).update(username="eve")
    with pytest.raises(SystemExit) as ended:
        call_command("verify_audit")
    assert ended.value.code == 1
    assert f"entry {log[0]} is not what was written" in capsys.readouterr().out


def test_missing_triggers_are_noticed_and_come_back(
    log: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert len(missing_triggers()) == 2
    with pytest.raises(SystemExit):
        call_command("doctor", "--json")
    assert "is missing" in json.loads(capsys.readouterr().out)["findings"][0]["problem"]
    set_triggers(connection)
    assert missing_triggers() == []
