"""`export_config` and `import_config`, and the drill: an empty database, a backup and the secrets make the same installation."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from django.core.management import CommandError, call_command

from audit.models import Entry, Head
from providers.models import Provider
from proxy.configuration import document
from tests.support.configuration import CANARY
from tests.support.gateway import Gateway
from tests.support.installation import fresh_secrets

pytestmark = pytest.mark.django_db


def run(*args: str) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    call_command(*args, stdout=out, stderr=err)
    return out.getvalue(), err.getvalue()


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_for_people_comes_back_without_a_difference(filled: str, tmp_path: Path, form: str) -> None:
    file = tmp_path / f"config.{form}"
    file.write_text(run("export_config", "--format", form)[0])
    head = Head.objects.get().seq

    assert run("import_config", str(file), "--diff", "--prune")[0] == "nothing to change\n"
    assert run("import_config", str(file), "--prune") == ("nothing to change\n", "")
    assert Head.objects.get().seq == head


def test_the_file_says_that_secrets_are_left_out(filled: str) -> None:
    text = run("export_config")[0]
    assert (
        text.startswith("#") and "Sealed secrets" in text and yaml.safe_load(text)["format"] == "penstock/1"
    )


def test_a_whole_backup_is_taken_out_on_request_and_recorded(filled: str) -> None:
    made = json.loads(run("export_config", "--with-sealed", "--format", "json")[0])

    assert document.content_of(made) == document.content_of(document.build(sealed=True))
    assert Entry.objects.latest("seq").action == "export_backup"


def test_a_difference_is_printed_and_ends_with_two(
    filled: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "format: penstock/1\nproviders:\n  - {slug: box, priority: 5}\n  - {name: N, kind: ollama, base_url: 'http://127.0.0.1:9'}\n"
    )

    with pytest.raises(SystemExit) as caught:
        call_command("import_config", str(file), "--diff")

    assert caught.value.code == 2
    assert capsys.readouterr().out == (
        "~ ai_server Box\n    priority: 100 -> 5\n+ ai_server N\n2 things would change\n"
    )
    assert "would change" in run("import_config", str(file), "--dry-run")[0]
    assert Provider.objects.get(slug="box").priority == 100
    assert run("import_config", str(file))[0].endswith("2 things changed\n")


def test_every_bad_row_is_printed_and_nothing_is_imported(filled: str, tmp_path: Path) -> None:
    file = tmp_path / "api_keys.csv"
    file.write_text(
        f"provider,key_name,api_key,weight,enabled\nnobody,a,{CANARY},1,true\ngroq,b,{CANARY},x,true\n"
    )
    err = io.StringIO()

    with pytest.raises(CommandError, match="2 problems; nothing was imported"):
        call_command("import_config", str(file), stdout=io.StringIO(), stderr=err)

    assert {line.partition(":")[0] for line in err.getvalue().splitlines()} == {
        "line 2, provider",
        "line 3, weight",
    }
    assert CANARY not in err.getvalue()


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b'{"format": "penstock/9"}', None])
def test_a_file_that_is_none_is_one_line(filled: str, tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "x"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CommandError) as caught:
        run("import_config", str(file))
    assert "\n" not in str(caught.value)


# -- the drill ---------------------------------------------------------------------------------------------------------

DRILL = """
from django.conf import settings
from django.core.management import call_command
from providers import keys
from providers.models import ApiKey
from proxy import snapshot
from proxy.auth import authenticate

call_command("import_config", {backup!r}, prune=True)
call_command("doctor")
call_command("verify_audit")
call_command("import_config", {backup!r}, prune=True, diff=True)
print([keys.opened(key).reveal() for key in ApiKey.objects.select_related("provider")])
print(authenticate({key!r}, snapshot.build().callers, settings.PENSTOCK_PEPPERS).name)
"""


@pytest.fixture
def first() -> Iterator[Gateway]:
    # With a key of its own its keyring is wrapped as in real life; a restore takes no weaker one.
    key = fresh_secrets()["PENSTOCK_ENCRYPTION_KEY"]
    with Gateway(start=False, env={"PENSTOCK_ENCRYPTION_KEY": key}) as gateway:
        yield gateway


@pytest.mark.timeout(300)
def test_f42_an_empty_database_a_backup_and_the_secrets_make_the_same_installation(first: Gateway) -> None:
    """From whatever database the suite runs on into a fresh SQLite one, which migrate has given a keyring of its own."""
    key = first.provide("http://127.0.0.1:9/v1", api_key=CANARY)
    backup = first.folder / "backup.json"
    backup.write_text(first.manage("export_config", "--with-sealed", "--format", "json"))
    assert CANARY not in backup.read_text() and key not in backup.read_text()
    folder = first.folder / "elsewhere"
    folder.mkdir(mode=0o700)
    elsewhere = {"DATA_DIR": str(folder), "DATABASE_URL": f"sqlite:///{folder / 'db.sqlite3'}"}
    assert first.run_manage("migrate", "--verbosity=0", env=elsewhere).returncode == 0

    code = DRILL.format(backup=str(backup), key=key)
    drill = first.run_manage("shell", "--no-imports", "--command", code, env=elsewhere)

    assert drill.returncode == 0, drill.stderr
    said = drill.stdout
    assert "all is well" in said and "nothing to change" in said
    assert str([CANARY]) in said, "the same secret, sealed under a keyring that it was not made under"
    assert said.splitlines()[-1] == "test 1", "the same gateway key is accepted"
