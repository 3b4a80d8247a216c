"""The backup on disk: written after changes and each day, whole or not at all, kept for a while, and looked at by doctor."""

from __future__ import annotations

import contextlib
import json
import os
import stat
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.utils import timezone

from audit.changes import changes
from audit.models import Head
from config.tasks import backup_config
from providers.models import Provider
from proxy.configuration import document, files
from tests.support.configuration import CANARY, restored
from tests.support.rows import files_with

pytestmark = pytest.mark.django_db


@pytest.fixture
def place(tmp_path: Path, settings: Any, filled: str) -> Path:
    settings.BACKUP_FILE = tmp_path / "backups" / "config_backup.json"
    return tmp_path / "backups"


def change(priority: int) -> None:
    with changes(actor=None, via="system"):
        box = Provider.objects.get(slug="box")
        box.priority = priority
        box.save()


def names(place: Path) -> list[str]:
    return sorted(path.name for path in place.iterdir() if not path.name.startswith("."))


def test_a_backup_is_whole_private_and_holds_no_secret_in_clear(place: Path, filled: str) -> None:
    made = files.write()

    assert stat.S_IMODE(made.path.stat().st_mode) == 0o600 and stat.S_IMODE(place.stat().st_mode) == 0o700
    stored = json.loads(made.path.read_text())
    assert document.content_of(stored) == document.content_of(document.build(sealed=True))
    assert stored["made"]["head"]["seq"] == made.version == Head.objects.get().seq
    for secret in (CANARY, filled):
        assert files_with(place, secret) == []


def test_a_write_that_fails_leaves_the_former_backup_and_nothing_else(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = files.write()
    before, listed = made.path.read_bytes(), names(place)
    change(1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(files.NotWritten, match="No space left"):
        files.write()

    assert made.path.read_bytes() == before
    assert [
        name for name in os.listdir(place) if name.startswith(f".{made.path.name}.") and name[-1].isdigit()
    ] == []
    assert set(listed) <= set(names(place))


def test_former_versions_are_kept_and_the_oldest_are_forgotten(
    place: Path, settings: Any, time_machine: Any
) -> None:
    settings.BACKUP_KEEP = 2
    begun = datetime.fromisoformat("2030-01-01T10:00:00+00:00")
    for day in range(4):
        time_machine.move_to(begun + timedelta(days=day), tick=False)
        change(day)
        files.write()
        files.write()

    assert names(place) == [
        "config_backup.20300102T100000Z.json",
        "config_backup.20300103.json",
        "config_backup.20300103T100000Z.json",
        "config_backup.20300104.json",
        "config_backup.json",
    ]
    kept = json.loads((place / "config_backup.20300103T100000Z.json").read_text())
    assert next(entry for entry in kept["providers"] if entry["slug"] == "box")["priority"] == 2
    restored(kept)
    assert Provider.objects.get(slug="box").priority == 2


def test_the_worker_writes_it_when_changes_have_settled_and_not_for_each_of_them(
    place: Path, time_machine: Any
) -> None:
    now = timezone.now() + timedelta(hours=1)
    time_machine.move_to(now, tick=False)
    backup_config()
    first = (place / "config_backup.json").stat().st_ino

    change(1)
    backup_config()
    assert (place / "config_backup.json").stat().st_ino == first, "another change may follow"
    time_machine.move_to(now + timedelta(seconds=4), tick=False)
    backup_config()
    second = (place / "config_backup.json").stat().st_ino
    assert second != first
    backup_config()
    assert (place / "config_backup.json").stat().st_ino == second, "nothing changed since"


def test_changes_without_a_pause_are_backed_up_within_a_minute(place: Path, time_machine: Any) -> None:
    now = timezone.now() + timedelta(hours=1)
    time_machine.move_to(now, tick=False)
    backup_config()
    for second in range(0, 70, 2):
        time_machine.move_to(now + timedelta(seconds=second), tick=False)
        change(second)
        backup_config()

    stored = files.head_of(place / "config_backup.json")
    assert stored is not None and stored[0] >= Head.objects.get().seq - 5


def test_a_day_without_changes_has_its_backup_too(place: Path, time_machine: Any) -> None:
    now = datetime.fromisoformat("2030-01-01T10:00:00+00:00")
    for day in (0, 1):
        time_machine.move_to(now + timedelta(days=day), tick=False)
        backup_config()
    assert names(place) == [
        "config_backup.20300101.json",
        "config_backup.20300102.json",
        "config_backup.json",
    ]


def test_where_nothing_is_kept_nothing_is_written_without_a_change(place: Path, settings: Any) -> None:
    settings.BACKUP_KEEP = 0
    change(1)
    files.write()
    change(2)
    files.write()

    assert names(place) == ["config_backup.json"]
    assert not files.is_due(timezone.now())


def test_a_disk_that_knows_no_second_names_keeps_copies(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unable(self: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", unable)
    files.write()
    change(1)
    files.write()

    assert len(names(place)) == 3
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in place.iterdir())


def test_a_disk_that_takes_nothing_is_a_line_in_the_log_and_no_crash(
    place: Path, settings: Any, caplog: pytest.LogCaptureFixture
) -> None:
    place.parent.joinpath("file").write_text("no folder")
    settings.BACKUP_FILE = place.parent / "file" / "config_backup.json"

    backup_config()

    assert "cannot be written" in caplog.text and CANARY not in caplog.text


def doctor(capsys: pytest.CaptureFixture[str]) -> list[str]:
    with pytest.raises(SystemExit) if files.problems() else contextlib.nullcontext():
        call_command("doctor")
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("backup ")]


def test_the_doctor_looks_at_the_backup(
    place: Path, capsys: pytest.CaptureFixture[str], settings: Any, time_machine: Any
) -> None:
    assert doctor(capsys) == [], "no worker has made one here yet"
    made = files.write()
    assert doctor(capsys) == []

    made.path.chmod(0o644)
    change(3)
    time_machine.move_to(timezone.now() + timedelta(minutes=9))
    said = doctor(capsys)
    assert len(said) == 2 and "chmod 600" in said[0] and "is the worker running" in said[1]

    made.path.write_text("{")
    assert "no backup of this version" in doctor(capsys)[0]
    made.path.unlink()
    assert "is gone" in doctor(capsys)[0]


def test_the_doctor_says_when_a_backup_is_sealed_under_another_key(place: Path, settings: Any) -> None:
    files.write()
    settings.PENSTOCK_ENCRYPTION_KEY = b"another key of 32 bytes or more!!"
    assert any("another PENSTOCK_ENCRYPTION_KEY" in problem for problem in files.problems())
