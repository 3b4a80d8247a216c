"""Django's own commands, where they change what is watched."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import Group, User
from django.core.management import call_command

from audit.models import Entry
from config.management.commands import changepassword

NEW = "a new long passphrase"


def test_changing_a_password_is_recorded_without_the_password(
    owner: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(changepassword.Command, "_get_pass", lambda self, prompt="": NEW)

    call_command("changepassword", owner.username, stdout=io.StringIO())

    owner.refresh_from_db()
    assert owner.check_password(NEW)
    entry = Entry.objects.latest("seq")
    assert (entry.action, entry.via, entry.entity_name) == ("update_user", "command", owner.username)
    assert entry.changes == {"password": ["••••", "••••"]}


def test_a_superuser_made_on_the_command_line_is_recorded(db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DJANGO_SUPERUSER_PASSWORD", NEW)

    call_command(
        "createsuperuser", "--noinput", username="second", email="s@example.com", stdout=io.StringIO()
    )

    assert User.objects.get(username="second").is_superuser
    assert Entry.objects.latest("seq").action == "add_user"


def test_loading_a_fixture_is_one_recorded_change(db: None, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"model": "auth.group", "pk": None, "fields": {"name": "team", "permissions": []}}
    ]
    fixture = tmp_path / "team.json"
    fixture.write_text(json.dumps(rows))

    call_command("loaddata", str(fixture), verbosity=0)

    assert Group.objects.filter(name="team").exists()
    assert Entry.objects.latest("seq").entity_name == "team"
