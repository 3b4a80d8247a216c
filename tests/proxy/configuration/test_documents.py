"""The configuration as a document: the same in and out, named by names, complete, and without a secret in clear."""

from __future__ import annotations

from copy import copy
from datetime import timedelta
from typing import Any
from uuid import uuid4

import pytest
from django.db.models.base import ModelState
from django.utils import timezone
from hypothesis import HealthCheck, given
from hypothesis import settings as bounds
from hypothesis import strategies as st

from audit.changes import changes
from audit.models import Entry, Head
from providers.models import ApiKey, Keyring, Provider, UpstreamModel
from proxy.configuration import document, foreign, reading
from proxy.configuration.restoring import restore
from proxy.configuration.sections import SECTIONS
from proxy.models import GatewayKey, ModelPrice, ModelRoute
from proxy.prices import add_override
from tests.support.configuration import CANARY, empty, refused, restored
from tests.support.rows import spellings

pytestmark = pytest.mark.django_db


def test_a_backup_restored_into_an_empty_database_is_the_same_backup(filled: str) -> None:
    before = document.build(sealed=True)
    empty()

    restored(before)

    assert document.content_of(document.build(sealed=True)) == document.content_of(before)


def test_the_same_configuration_makes_the_same_text(filled: str) -> None:
    assert document.as_yaml(document.build(sealed=False)) == document.as_yaml(document.build(sealed=False))
    first, second = (document.as_json(document.content_of(document.build(sealed=True))) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("sealed", [True, False])
def test_no_document_holds_a_secret_in_clear_or_a_number_of_the_database(filled: str, sealed: bool) -> None:
    made = document.build(sealed=sealed)
    for text in (document.as_json(made), document.as_yaml(made)):
        for secret in (CANARY, filled):
            assert not any(word in text.encode() for word in spellings(secret))
    assert all("id" not in entry for section in SECTIONS for entry in made.get(section.name, ()))


def test_a_backup_carries_sealed_secrets_with_the_id_of_their_data_key(filled: str) -> None:
    made = document.build(sealed=True)

    sealed = {entry["name"]: entry["sealed"] for entry in made["api_keys"]}
    assert all(text.split(".")[:2] == ["v1", made["keyring"]["primary"]] for text in sealed.values())
    assert made["keyring"]["wraps"] == Keyring.objects.get().wraps


def test_a_file_for_people_has_references_and_no_other_secret(filled: str) -> None:
    made = document.build(sealed=False)

    assert {entry["name"]: entry.get("secret") for entry in made["api_keys"]} == {
        "team": None,
        "spare": "env://OPENAI_SPARE",
    }
    assert not {"keyring", "peppers", "made", "users"} & made.keys()
    assert "hmac" not in made["gateway_keys"][0]
    assert [entry["slug"] for entry in made["providers"]] == ["box", "openai"], (
        "untouched vendors are left out"
    )
    assert [entry["name"] for entry in made["models"]] == ["tiny"], "so is what a provider lists by itself"


def test_every_column_that_people_may_change_is_in_the_document(filled: str) -> None:
    """A column that is added to a model and forgotten here would silently be lost by a restore."""
    noise = {"id", "version", "created_at", "updated_at", "created_by"}
    derived = {
        "api_keys": {"secret", "reference", "last4", "fingerprint"},
        "prices": {"source", "vendor", "provider_id", "match"},
    }
    for section in SECTIONS:
        if section.name in {"users", "teams"}:
            continue
        columns = {field.name for field in section.model._meta.concrete_fields}
        ignored = noise | derived.get(section.name, set())
        assert columns - ignored == {*section.columns, *section.sealed}, section.name


def test_restoring_twice_changes_nothing(filled: str) -> None:
    for made in (document.build(sealed=True), document.build(sealed=False)):
        head = Head.objects.get().seq
        versions = list(Provider.objects.values_list("slug", "version"))

        outcome = restored(made)

        assert outcome.changes == ()
        assert Head.objects.get().seq == head
        assert list(Provider.objects.values_list("slug", "version")) == versions


def test_a_price_that_was_corrected_before_it_began_hinders_no_restore(filled: str) -> None:
    begin = timezone.now() + timedelta(days=30)
    for rate in (5, 50):
        with changes(actor=None, via="system"):
            row = ModelPrice(model="tiny", prompt=rate, completion=rate, effective_from=begin)
            add_override(row, Provider.objects.get(slug="box"))
    made = document.build(sealed=True)
    (price,) = made["prices"]
    assert price["prompt"] == 50

    assert restored(made).changes == ()
    # As documents were that have it still.
    never = {**price, "prompt": 5, "effective_until": price["effective_from"]}
    for prices in ([price, never], [never, price]):
        outcome = restored({**made, "prices": prices})
        assert outcome.changes == ()
        assert any("never held" in note for note in outcome.notes)


def test_each_changed_object_is_one_entry_of_the_audit_log(filled: str) -> None:
    made = document.build(sealed=True)
    head = Head.objects.get().seq
    with changes(actor=None, via="system"):
        box = Provider.objects.get(slug="box")
        box.priority, box.metadata = 5, {}
        box.save()

    restored(made)

    entries = Entry.objects.filter(seq__gt=head + 1)
    assert [(entry.action, entry.via, entry.entity_name) for entry in entries] == [
        ("update_server", "restore", "Box")
    ]
    assert entries[0].changes == {"priority": [5, 100], "metadata": [{}, {"rack": 7}]}


def test_a_dry_run_says_the_same_and_changes_nothing(filled: str) -> None:
    made = document.build(sealed=True)
    empty()
    head = Head.objects.get().seq

    planned = restored(made, dry_run=True)

    assert Head.objects.get().seq == head and not Provider.objects.exists()
    done = restored(made)
    told = [(entry.action, entry.entity_name) for entry in planned.changes]
    assert told == [(entry.action, entry.entity_name) for entry in done.changes] and told


def test_pruning_makes_the_database_exactly_what_the_document_says(filled: str) -> None:
    made = document.build(sealed=True)
    with changes(actor=None, via="system"):
        extra = Provider.objects.create(
            slug="extra", name="Extra", kind="ollama", base_url="http://127.0.0.1:9102"
        )
        ModelRoute.objects.create(name="late").nodes.create(position=0, provider=extra)

    merged = restored(made)
    assert merged.changes == () and Provider.objects.filter(slug="extra").exists()
    restored(made, prune=True)

    assert (
        not Provider.objects.filter(slug="extra").exists()
        and not ModelRoute.objects.filter(name="late").exists()
    )
    assert document.content_of(document.build(sealed=True)) == document.content_of(made)


NAMED = [
    (Provider, "slug", "box"),
    (Provider, "name", "Box"),
    (ApiKey, "name", "team"),
    (GatewayKey, "name", "chatbot"),
]


def another(row: Any, **columns: Any) -> Any:
    """A new row, otherwise like this one."""
    new = copy(row)
    new.pk, new._state = None, ModelState()
    fresh = {"uid": uuid4(), "key_id": "B" * 10, "slug": "another", "name": "Another", "is_default": False}
    for column, value in {**fresh, **columns}.items():
        if hasattr(row, column):
            setattr(new, column, value)
    new.save()
    return new


@pytest.mark.parametrize(("model", "column", "name"), NAMED)
def test_a_name_that_was_passed_on_comes_back_from_whoever_is_pruned(
    filled: str, model: Any, column: str, name: str
) -> None:
    made = document.build(sealed=True)
    with changes(actor=None, via="system"):
        row = model.objects.get(**{column: name})
        setattr(row, column, "renamed")
        row.save()
        heir = another(row, **{column: name})
        told = heir.audit_identity()

    assert any("already exists" in line for line in refused(made))
    outcome = restored(made, prune=True)

    assert document.content_of(document.build(sealed=True)) == document.content_of(made)
    (gone,) = [entry for entry in outcome.changes if entry.entity_id == told.entity_id]
    assert (gone.action, gone.entity_name) == (f"delete_{told.noun}", told.entity_name)
    assert gone.changes[column] == [name, None]


@pytest.mark.parametrize(("model", "column", "name"), NAMED)
def test_names_that_were_exchanged_are_exchanged_again(
    filled: str, model: Any, column: str, name: str
) -> None:
    with changes(actor=None, via="system"):
        one = model.objects.get(**{column: name})
        two = another(one, **{column: "heir"})
    made = document.build(sealed=True)
    with changes(actor=None, via="system"):
        for row, value in ((one, "between"), (two, name), (one, "heir")):
            setattr(row, column, value)
            row.save()

    outcome = restored(made)

    assert document.content_of(document.build(sealed=True)) == document.content_of(made)
    assert sorted(entry.changes[column] for entry in outcome.changes) == sorted(
        [["heir", name], [name, "heir"]]
    )


def test_a_name_is_not_taken_from_a_row_that_gets_no_other(filled: str) -> None:
    box = Provider.objects.get(slug="box")
    with changes(actor=None, via="system"):
        other = another(box)
    entries = [{"uid": str(other.uid), "slug": "box"}, {"uid": str(box.uid)}]
    for order in (entries, entries[::-1]):
        (problem,) = refused({"format": "penstock/1", "providers": order})
        assert "slug" in problem and "already exists" in problem
    assert Provider.objects.get(pk=box.pk).slug == "box"


def test_pruning_keeps_vendors_that_wait_and_models_that_providers_list(filled: str) -> None:
    restored(document.build(sealed=False), prune=True)

    assert Provider.objects.filter(slug="anthropic").exists()
    assert UpstreamModel.objects.filter(name="gpt-4o").exists()


def test_what_a_file_owns_is_marked_and_is_all_that_it_prunes(filled: str) -> None:
    mine = {"slug": "mine", "name": "Mine", "kind": "ollama", "base_url": "http://127.0.0.1:9103"}
    made = {"format": "penstock/1", "managed_by": "platform", "providers": [mine]}

    restored(made, prune=True)
    assert Provider.objects.get(slug="mine").managed_by == "platform"
    assert Provider.objects.filter(slug="box").exists(), "it is not the file's"
    assert restored(made, prune=True).changes == ()
    restored({**made, "providers": []}, prune=True)

    assert not Provider.objects.filter(slug="mine").exists()


def test_what_is_in_use_elsewhere_is_not_pruned_and_nothing_is(filled: str) -> None:
    head = Head.objects.get().seq
    said = refused({"format": "penstock/1", "providers": []}, prune=True)

    assert any("in use by" in line for line in said)
    assert Head.objects.get().seq == head


def test_what_an_entry_leaves_out_stays_as_it_is(filled: str) -> None:
    outcome = restored({"format": "penstock/1", "providers": [{"slug": "box", "priority": 7}]})

    assert [entry.changes for entry in outcome.changes] == [{"priority": [100, 7]}]
    assert Provider.objects.get(slug="box").metadata == {"rack": 7}


# -- for any configuration ---------------------------------------------------------------------------------------------

words = st.text("abcdefgh-", min_size=1, max_size=8).map(lambda text: f"a{text}z")
texts = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=20)
metadata = st.dictionaries(words, texts | st.integers(-5, 5) | st.booleans() | st.none(), max_size=3)
providers = st.fixed_dictionaries(
    {
        "slug": words,
        "kind": st.sampled_from(["vllm", "ollama", "openai-compatible"]),
        "base_url": st.sampled_from(
            ["http://127.0.0.1:9101", "http://10.1.2.3:80/v1", "https://example.org/llm"]
        ),
        "enabled": st.booleans(),
        "priority": st.integers(-1000, 1000),
        "metadata": metadata,
        "custom_headers": st.dictionaries(words, st.text("abc ", max_size=5), max_size=2),
        "idle_timeout_seconds": st.none() | st.floats(0.5, 100),
    }
)
key_entries = st.fixed_dictionaries(
    {
        "name": words,
        "secret": st.text("abcdef0123456789", min_size=1, max_size=40) | st.just("env://SOME"),
        "weight": st.integers(1, 9),
    }
)
model_entries = st.fixed_dictionaries(
    {
        "name": words,
        "purposes": st.lists(st.sampled_from(["chat", "embeddings"]), unique=True),
        "enabled": st.booleans(),
    }
)


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    """Any servers with any keys, models and routes."""
    made: dict[str, Any] = {"format": "penstock/1", "api_keys": [], "models": [], "model_routes": []}
    made["providers"] = [
        {**entry, "name": f"{entry['slug']} {draw(texts).strip()}".strip()}
        for entry in draw(st.lists(providers, max_size=3, unique_by=lambda entry: entry["slug"]))
    ]
    for entry in made["providers"]:
        for section, entries in (("api_keys", key_entries), ("models", model_entries)):
            found = draw(st.lists(entries, max_size=3, unique_by=lambda each: each["name"]))
            made[section] += [{"provider": entry["slug"], **each} for each in found]
    slugs = [entry["slug"] for entry in made["providers"]]
    for name in draw(st.lists(words, max_size=2, unique=True)):
        nodes = [{"provider": slug, "weight": 2} for slug in draw(st.permutations(slugs))]
        made["model_routes"].append(
            {"name": name, "mode": draw(st.sampled_from(["auto", "multi"])), "nodes": nodes}
        )
    return made


@bounds(
    max_examples=12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(configurations())
def test_any_configuration_comes_back_as_it_was(ring: None, made: dict[str, Any]) -> None:
    empty()
    restored(made)
    for sealed, write in ((True, document.as_json), (True, document.as_yaml)):
        first = document.build(sealed=sealed)
        empty()
        restore(foreign.source_of(reading.read(write(first).encode())), actor=None)
        assert document.content_of(document.build(sealed=sealed)) == document.content_of(first)
    people = document.as_yaml(document.build(sealed=False))
    assert restore(foreign.source_of(reading.read(people.encode())), actor=None, prune=True).changes == ()
