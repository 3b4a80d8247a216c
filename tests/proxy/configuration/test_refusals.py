"""What is wrong with a document is told, all of it, with its place; then nothing was changed, and no value is repeated."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from django.conf import settings as django_settings
from django.contrib.auth.models import User

from audit.changes import changes
from audit.models import Head
from providers import crypto, keyring, keys
from providers.models import ApiKey, Provider
from proxy.configuration import document, foreign, reading
from proxy.configuration.restoring import Refused, restore
from proxy.keys import revoke
from proxy.models import GatewayKey, ModelRoute
from tests.support.configuration import CANARY, empty, refused, restored

pytestmark = pytest.mark.django_db
FORMAT = {"format": "penstock/1"}
FORMER = django_settings.PENSTOCK_ENCRYPTION_KEY


def server(**fields: Any) -> dict[str, Any]:
    return {"slug": "mine", "name": "Mine", "kind": "ollama", "base_url": "http://127.0.0.1:9103", **fields}


def unreadable(text: str | bytes) -> str:
    with pytest.raises(reading.Unreadable) as caught:
        foreign.source_of(reading.read(text.encode() if isinstance(text, str) else text))
    return str(caught.value)


def test_every_wrong_entry_is_named_with_its_line_and_field(ring: None) -> None:
    text = """format: penstock/1
providers:
  - {slug: good, name: Good, kind: ollama, base_url: "http://127.0.0.1:9103"}
  - {slug: Bad Slug, name: Bad, kind: ollama, base_url: "http://127.0.0.1:9103"}
  - {slug: far, name: Far, kind: openai, base_url: "http://169.254.169.254/v1", priority: high}
  - {slug: odd, name: Odd, kind: ollama, base_url: "http://127.0.0.1:9103", colour: red}
model_routes:
  - name: a/b
    nodes: [{provider: good}]
  - name: lost
    nodes: [{provider: nobody}]
"""
    with pytest.raises(Refused) as caught:
        restore(foreign.source_of(reading.read(text.encode())), actor=None)

    said = [(problem.place, problem.field) for problem in caught.value.problems]
    assert said == [
        ("line 4", "slug"),
        ("line 5", "priority"),
        ("line 6", "colour"),
        ("line 8", "name"),
        ("line 10", "nodes.0.provider"),
    ]
    assert not Provider.objects.filter(slug="good").exists()


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"base_url": "http://169.254.169.254/latest", "kind": "openai"}, "base_url"),
        ({"base_url": "http://[::ffff:169.254.169.254]/"}, "base_url"),
        ({"base_url": "http://10.0.0.1/v1", "kind": "openai"}, "base_url"),
        ({"base_url": "ftp://example.org"}, "base_url"),
        ({"custom_headers": {"Host": "evil"}}, "custom_headers"),
        ({"custom_headers": {"X-A": "b\r\nX-C: d"}}, "custom_headers"),
        ({"metadata": {"big": "x" * 20_000}}, "metadata"),
        ({"kind": "no-such-kind", "base_url": "https://example.org"}, "kind"),
        ({"enabled": "yes"}, "enabled"),
        ({"priority": None}, "priority"),
        ({"priority": 10**12}, "priority"),
        ({"idle_timeout_seconds": 10**400}, "idle_timeout_seconds"),
        ({"ca_pem": "-----BEGIN"}, "ca_pem"),
        ({"uid": "x"}, "uid"),
    ],
)
def test_what_a_form_would_refuse_is_refused(ring: None, fields: dict[str, Any], field: str) -> None:
    said = refused({**FORMAT, "providers": [server(**fields)]})

    assert len(said) == 1 and said[0].startswith(f"line 1, {field}:"), said


def test_allow_private_lets_a_vendor_be_near_but_never_at_metadata(ring: None) -> None:
    vendor = server(kind="openai", base_url="http://10.0.0.1/v1", allow_private=True)

    restored({**FORMAT, "providers": [vendor]})
    assert Provider.objects.get(slug="mine").allow_private
    assert refused({**FORMAT, "providers": [{**vendor, "base_url": "http://169.254.169.254/v1"}]})


def test_a_newer_format_is_refused_with_one_line(ring: None) -> None:
    assert unreadable(json.dumps({"format": "penstock/2", "providers": []})) == (
        "This file has the format penstock/2, and this version of Penstock reads up to penstock/1. Upgrade first."
    )
    assert "unknown" in unreadable(json.dumps({"format": {"a": 1}}))


def test_a_section_of_a_newer_version_is_refused_by_name(ring: None) -> None:
    assert refused({**FORMAT, "wishes": []}) == ["wishes: There is no such section."]
    assert refused({**FORMAT, "providers": {"a": 1}}) == ["providers: Write a list."]
    assert refused({**FORMAT, "providers": ["a"]})[0].endswith("Write an object.")


def test_the_same_thing_twice_is_refused(ring: None) -> None:
    assert "twice" in refused({**FORMAT, "providers": [server(), server()]})[0]
    two = [
        {"provider": "openai", "name": name, "secret": "sk-1234567890ab", "is_default": True} for name in "ab"
    ]
    assert "is_default" in refused({**FORMAT, "api_keys": two})[0]


def test_an_address_that_moves_needs_its_keys_again(filled: str) -> None:
    away = {"slug": "openai", "base_url": "https://elsewhere.example.org/v1"}
    head = Head.objects.get().seq

    assert "Every key" in refused({**FORMAT, "providers": [away]})[0]
    again = [
        {"provider": "openai", "name": name, "secret": f"sk-{name}-0123456789"} for name in ("team", "spare")
    ]
    restored({**FORMAT, "providers": [away], "api_keys": again})

    assert Head.objects.get().seq > head
    team = ApiKey.objects.select_related("provider").get(name="team")
    assert keys.opened(team).reveal() == "sk-team-0123456789"


def test_a_key_stays_with_its_provider(filled: str) -> None:
    team = ApiKey.objects.get(name="team")
    said = refused({**FORMAT, "api_keys": [{"uid": str(team.uid), "provider": "groq", "name": "team"}]})
    assert said == ["line 1, provider: A key stays with its provider; add it there anew."]


def test_a_sealed_value_that_was_touched_or_moved_is_refused_and_named(filled: str) -> None:
    made = document.build(sealed=True)
    empty()
    team = next(entry for entry in made["api_keys"] if entry["name"] == "team")
    team["sealed"] = team["sealed"][:-6] + "AAAAAA"
    said = refused(made)
    assert len(said) == 2 and "sealed: Does not open" in said[0] and "targets.0.api_key" in said[1]

    made = json.loads(json.dumps(made))
    openai = next(entry for entry in made["providers"] if entry["slug"] == "openai")
    openai["base_url"] = "https://elsewhere.example.org/v1"
    assert sum("Does not open" in line for line in refused(made)) == 2


@pytest.fixture
def elsewhere(filled: str, settings: Any) -> dict[str, Any]:
    """A backup, and a database that has another keyring under another encryption key since."""
    made = document.build(sealed=True)
    empty()
    settings.PENSTOCK_ENCRYPTION_KEY = b"another key of 32 bytes or more!!"
    with changes(actor=None, via="system"):
        keyring.replace(crypto.Keyring.fresh())
    crypto.install(None)
    keyring.load()
    return made


def test_a_backup_that_this_installation_cannot_open_is_refused_and_each_secret_is_listed(
    elsewhere: dict[str, Any],
) -> None:
    said = refused(elsewhere)

    assert sum("PENSTOCK_ENCRYPTION_KEY" in line for line in said) == 2
    assert not Provider.objects.exists()


def test_with_the_former_encryption_key_the_same_backup_opens(
    elsewhere: dict[str, Any], settings: Any
) -> None:
    settings.PENSTOCK_NEW_ENCRYPTION_KEY = FORMER
    restored(elsewhere)

    team = ApiKey.objects.select_related("provider").get(name="team")
    assert keys.opened(team).reveal() == CANARY
    assert crypto.key_id(team.secret.raw()) == crypto.current_keyring().primary, "it is sealed anew here"
    assert restored(elsewhere).changes == ()


@pytest.mark.parametrize(
    "wrap",
    [
        {"salt": "AAAA", "rounds": 2**40, "blob": "AAAA"},
        {"salt": "AAAA", "rounds": 1, "blob": "AAAA"},
        {"salt": 1, "rounds": 600_000, "blob": []},
        {"salt": "é", "rounds": 600_000, "blob": "AAAA"},
        {"salt": "A", "rounds": 600_000, "blob": "A"},
        "wrap",
    ],
)
def test_a_keyring_that_is_none_opens_nothing_and_costs_little(elsewhere: dict[str, Any], wrap: Any) -> None:
    elsewhere["keyring"] = {"wraps": [wrap]}
    begun = time.monotonic()
    assert refused(elsewhere)
    assert time.monotonic() - begun < 30


def test_a_key_under_a_pepper_that_is_missing_or_another_is_refused(filled: str, settings: Any) -> None:
    made = document.build(sealed=True)
    empty()
    settings.PENSTOCK_PEPPERS = {7: b"seven" * 8}
    assert any("PENSTOCK_PEPPERS has no pepper" in line for line in refused(made))
    settings.PENSTOCK_PEPPERS = dict.fromkeys((1, 7), b"seven" * 8)
    assert any(line.startswith("peppers.1:") for line in refused(made))


def test_a_revoked_key_stays_revoked_whatever_a_backup_says(filled: str) -> None:
    made = document.build(sealed=True)
    with changes(actor=None, via="system"):
        revoke(GatewayKey.objects.get(name="chatbot"))

    outcome = restored(made)

    key = GatewayKey.objects.get(name="chatbot")
    assert key.revoked_at is not None and not key.enabled
    assert outcome.changes == () and "revoked" in outcome.notes[0]


def test_a_key_without_its_secret_is_left_out_with_a_word_and_kept_where_it_is(filled: str) -> None:
    made = document.build(sealed=False)
    assert restored(made).notes == ()
    empty()
    del made["active"]

    outcome = restored(made)

    assert len(outcome.notes) == 2 and all("no secret" in note for note in outcome.notes)
    assert [key.name for key in ApiKey.objects.all()] == ["spare"]
    assert not GatewayKey.objects.exists() and ModelRoute.objects.exists()


def test_an_owner_who_is_missing_is_made_without_password_or_role_and_nobody_else_is_touched(
    filled: str, owner: User
) -> None:
    made = document.build(sealed=True)
    with changes(actor=None, via="system"):
        owner.is_active = False
        owner.save()
    restored(made)
    owner.refresh_from_db()
    assert not owner.is_active, "who is there stays as he is"
    with changes(actor=None, via="system"):
        owner.delete()

    restored(made)

    again = User.objects.get(username="owner")
    assert not again.has_usable_password() and not again.is_staff and not again.is_superuser
    assert GatewayKey.objects.get().owner == again


# -- text of strangers -------------------------------------------------------------------------------------------------

LAUGHS = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{name}: &{name} [{','.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
DEEP = (
    ("[" * 100_000, "deep"),
    ("- " * 50_000 + "x", "deep"),
    ('{"a":' * 5_000 + "1" + "}" * 5_000, "deep"),
    (LAUGHS, "aliases"),
    ("a: &a [*a]\n", "itself"),
    ("a: 1\na: 2\n", "twice"),
    ('{"a": 1, "a": 2}', "twice"),
    ("a: !!python/object/apply:os.system [id]\n", "YAML"),
    ("a: !!binary aGk=\n", "JSON"),
    ("a: .nan\n", "NaN"),
    ('{"a": NaN}', "NaN"),
    ("1: x\n", "text"),
    ('a: "\\ud800"\n', ""),
    ("a: [\n", "line"),
    ("a: " + "9" * 5_000 + "\n", ""),
    (b"\xff\xfe", "UTF-8"),
    ("a\0b", "NUL"),
    ("", "no configuration"),
    ("just words", "no configuration"),
    ("provider,api_key\nopenai,x\n", "header"),
    ('provider,key_name,api_key\nopenai,"x\n', "CSV"),
)


@pytest.mark.parametrize(("text", "word"), DEEP, ids=range(len(DEEP)))
def test_a_text_that_would_hurt_is_refused_quickly_and_in_one_sentence(text: str | bytes, word: str) -> None:
    begun = time.monotonic()
    said = unreadable(text)

    assert time.monotonic() - begun < 10
    assert word in said and "\n" not in said


def test_aliases_that_people_write_are_fine(ring: None) -> None:
    text = """format: penstock/1
managed_by: &me platform
providers:
  - &box {slug: one, name: One, kind: ollama, base_url: "http://127.0.0.1:9103", metadata: {by: *me}}
  - {<<: *box, slug: two, name: Two}
"""
    restore(foreign.source_of(reading.read(text.encode())), actor=None)

    two = Provider.objects.get(slug="two")
    assert (two.base_url, two.metadata, two.managed_by) == (
        "http://127.0.0.1:9103",
        {"by": "platform"},
        "platform",
    )
