"""The page about backups: a download, a file made now, and a restore only after a look at what it changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.contrib.sessions.models import Session
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client

from audit.changes import changes
from audit.models import Entry
from providers import keys
from providers.models import ApiKey, Provider
from proxy.configuration import document
from tests.support.configuration import CANARY, empty
from tests.support.rows import spellings

pytestmark = pytest.mark.django_db
PAGE = "/admin/backup/"
YAML = f"""format: penstock/1
managed_by: platform
providers:
  - {{slug: box, priority: 5}}
api_keys:
  - {{provider: groq, name: team, secret: {CANARY}}}
"""


@pytest.fixture(autouse=True)
def place(tmp_path: Path, settings: Any, filled: str) -> Path:
    settings.BACKUP_FILE = tmp_path / "backups" / "config_backup.json"
    settings.STATIC_ROOT.mkdir(parents=True, exist_ok=True)
    return Path(settings.BACKUP_FILE)


@pytest.fixture
def admin(client: Client, owner: User) -> Client:
    client.force_login(owner, backend="django.contrib.auth.backends.ModelBackend")
    return client


def look(admin: Client, text: str, **fields: Any) -> Any:
    upload = SimpleUploadedFile("config.yaml", text.encode())
    return admin.post(f"{PAGE}difference/", {"file": upload, **fields})


def test_it_is_the_administrators_page(client: Client, operator: User, viewer: User) -> None:
    for user in (operator, viewer):
        client.force_login(user, backend="django.contrib.auth.backends.ModelBackend")
        assert client.get(PAGE).status_code == 403
        for name in ("download", "make", "difference", "restore"):
            assert client.post(f"{PAGE}{name}/").status_code == 403
        assert "admin/backup" not in client.get("/admin/").content.decode()


def test_a_backup_is_made_and_downloaded_by_a_button(admin: Client, place: Path) -> None:
    assert "none yet" in admin.get(PAGE).content.decode()
    assert admin.get(f"{PAGE}download/").status_code == 405, "a link must not take it out"
    assert admin.post(f"{PAGE}make/").status_code == 302 and place.exists()
    assert "up to date" in admin.get(PAGE).content.decode()

    made = json.loads(admin.post(f"{PAGE}download/").content)

    assert made["format"] == document.FORMAT
    assert Entry.objects.latest("seq").action == "export_backup"


def test_a_file_is_looked_at_and_then_restored(admin: Client) -> None:
    page = look(admin, YAML).content.decode()
    assert "priority" in page and "groq" in page.lower() and CANARY not in page
    assert Provider.objects.get(slug="box").priority == 100, "a look changes nothing"
    stored = "".join(session.session_data for session in Session.objects.all())
    decoded = json.dumps([session.get_decoded() for session in Session.objects.all()])
    assert not any(word in (stored + decoded).encode() for word in spellings(CANARY)), "it waits sealed"

    answer = admin.post(f"{PAGE}restore/", follow=True).content.decode()

    assert "things changed" in answer
    assert Provider.objects.get(slug="box").priority == 5
    key = ApiKey.objects.select_related("provider").get(provider__slug="groq")
    assert keys.opened(key).reveal() == CANARY
    assert "pending_restore" not in json.dumps([session.get_decoded() for session in Session.objects.all()])


def test_nothing_is_restored_without_a_look_or_when_somebody_was_faster(admin: Client) -> None:
    assert admin.post(f"{PAGE}restore/").status_code == 400
    look(admin, YAML)
    with changes(actor=None, via="system"):
        box = Provider.objects.get(slug="box")
        box.priority = 50
        box.save()

    answer = admin.post(f"{PAGE}restore/")

    assert answer.status_code == 400 and "Somebody changed" in answer.content.decode()
    assert Provider.objects.get(slug="box").priority == 50


def test_without_a_file_the_backup_on_the_machine_is_taken(admin: Client) -> None:
    assert "no backup on this machine" in admin.post(f"{PAGE}difference/").content.decode()
    admin.post(f"{PAGE}make/")
    empty()

    assert "Box" in admin.post(f"{PAGE}difference/").content.decode()
    admin.post(f"{PAGE}restore/")
    assert Provider.objects.filter(slug="box").exists()


@pytest.mark.parametrize(
    "text",
    [
        "a: [",
        "providers:\n  - {name: A, base_url: 'http://169.254.169.254/'}\n",
        "",
        "\0",
        "format: penstock/9",
    ],
)
def test_what_is_wrong_with_a_file_is_told_on_the_page(admin: Client, text: str) -> None:
    answer = look(admin, text)

    assert answer.status_code == 400 and 'role="alert"' in answer.content.decode()


def test_what_a_file_owns_is_marked_in_lists_and_warned_of_in_forms(admin: Client) -> None:
    assert "Managed by" not in admin.get("/admin/providers/server/").content.decode()
    look(admin, YAML)
    admin.post(f"{PAGE}restore/")

    assert "platform" in admin.get("/admin/providers/server/").content.decode()
    form = admin.get(
        f"/admin/providers/server/{Provider.objects.get(slug='box').pk}/change/"
    ).content.decode()
    assert "belongs to the configuration file “platform”" in form
