"""What providers can serve: asking a real server, and keeping what it said."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.core.management import call_command

from audit.changes import NotInChanges, changes
from audit.models import Entry, Head
from providers import catalog, errors
from providers.models import Provider, ProviderHealth, UpstreamModel
from providers.wire import Model
from tests.support.answers import raw, status
from tests.support.upstream import Upstream

pytestmark = [pytest.mark.django_db, pytest.mark.usefixtures("ring")]


@pytest.fixture
def server(provide: Callable[..., Provider], upstream: Upstream) -> Provider:
    return provide("server", f"{upstream.url}/v1")


def listing(*rows: str | dict[str, Any]) -> Any:
    data = [{"id": row} if isinstance(row, str) else row for row in rows]
    return raw(json.dumps({"data": data}).encode())


def refresh(provider: Provider) -> catalog.RefreshResult:
    return catalog.refresh_models(provider, actor=None, via="task")


def names(provider: Provider, **fields: Any) -> set[str]:
    return set(UpstreamModel.objects.filter(provider=provider, **fields).values_list("name", flat=True))


def write(provider: Provider, name: str, **fields: Any) -> UpstreamModel:
    with changes(actor=None, via="system"):
        return UpstreamModel.objects.create(provider=provider, name=name, **fields)


def discovered(provider: Provider, *models: Model) -> None:
    with changes(actor=None, via="system"):
        catalog.save_models(provider, models)


def test_what_is_listed_is_kept_with_one_entry(server: Provider, operator: User) -> None:
    result = catalog.refresh_models(server, actor=operator, via="api", ip="192.0.2.1", request_id="r-1")
    assert (result.added, result.updated, result.removed) == (("big", "tiny"), (), ())
    assert names(server, source="discovered", enabled=True) == {"big", "tiny"}
    assert ProviderHealth.objects.filter(provider=server).count() <= 1
    entry = Entry.objects.latest("seq")
    assert (entry.action, entry.entity_type, entry.username) == ("update_server", "ai_server", "operator")
    assert (entry.ip, entry.request_id) == ("192.0.2.1", "r-1")
    assert entry.changes == {"models": [[], ["big", "tiny"]]}


def test_a_refresh_that_finds_nothing_new_leaves_no_trace(server: Provider) -> None:
    refresh(server)
    before, rows = Head.objects.get().seq, set(UpstreamModel.objects.values_list("pk", "name"))
    assert not refresh(server).changed
    assert Head.objects.get().seq == before
    assert set(UpstreamModel.objects.values_list("pk", "name")) == rows


def test_facts_that_changed_are_updated_and_told_in_the_same_entry(
    server: Provider, upstream: Upstream
) -> None:
    upstream.on("/models", listing({"id": "a", "max_model_len": 4096}, {"id": "b", "max_model_len": 4096}))
    refresh(server)
    upstream.on("/models", listing({"id": "a", "max_model_len": 8192}, {"id": "b"}, "c"))
    result = refresh(server)
    assert (result.added, result.updated) == (("c",), ("a",))
    assert dict(UpstreamModel.objects.values_list("name", "context_window")) == {
        "a": 8192,
        "b": 4096,
        "c": None,
    }
    told = Entry.objects.latest("seq").changes
    assert told["models_known"] == [{"a": {"context_window": 4096}}, {"a": {"context_window": 8192}}]


def test_models_that_vanished_go_and_hand_written_ones_stay(server: Provider, upstream: Upstream) -> None:
    write(server, "by hand", context_window=1)
    refresh(server)
    upstream.on("/models", listing("tiny"))
    assert refresh(server).removed == ("big",)
    assert names(server) == {"tiny", "by hand"}
    assert Entry.objects.latest("seq").changes == {"models": [["big"], []]}


def test_a_listed_model_that_was_written_by_hand_keeps_what_the_hand_wrote(
    server: Provider, upstream: Upstream
) -> None:
    write(server, "tiny", context_window=1)
    upstream.on("/models", listing({"id": "tiny", "max_model_len": 4096}))
    assert not refresh(server).changed
    assert UpstreamModel.objects.get(name="tiny").context_window == 1


def test_a_model_that_a_person_disabled_does_not_come_back_enabled(
    server: Provider, upstream: Upstream
) -> None:
    refresh(server)
    with changes(actor=None, via="system"):
        row = UpstreamModel.objects.get(name="big")
        row.enabled = False
        row.save()
    upstream.on("/models", listing("tiny"))
    refresh(server)
    upstream.on("/models", None)
    refresh(server)
    assert names(server, enabled=True) == {"tiny"}
    assert names(server, enabled=False) == {"big"}


def test_a_vendor_that_suddenly_lists_nothing_is_not_believed_but_a_server_is(
    provide: Callable[..., Provider],
) -> None:
    vendor = provide("vendor", "https://api.example.com/v1", kind="openai")
    own = provide("own", "http://127.0.0.1:9", kind="ollama")
    for provider in (vendor, own):
        discovered(provider, Model("a"))
        discovered(provider)
    assert (names(vendor), names(own)) == ({"a"}, set())


def test_a_refresh_that_fails_changes_nothing(server: Provider, upstream: Upstream) -> None:
    refresh(server)
    before = Head.objects.get().seq
    for behaviour, error in ((status(500), errors.UpstreamFailed), (raw(b"[1"), errors.ProtocolError)):
        upstream.on("/models", behaviour)
        with pytest.raises(error):
            refresh(server)
    assert names(server) == {"big", "tiny"}
    assert Head.objects.get().seq == before


def test_saving_outside_of_a_change_is_refused(server: Provider) -> None:
    with pytest.raises(NotInChanges):
        catalog.save_models(server, [Model("a")])


async def test_a_hostile_list_is_bounded(upstream: Upstream) -> None:
    rows = [f"m{number:05}" for number in range(5000)]
    upstream.on("/models", listing(*rows, "x" * 300, "a\nb", " a", "", "ab\u202e", {"id": 5}))
    provider = Provider(name="x", slug="x", base_url=f"{upstream.url}/v1")
    found = await catalog.discover(provider.endpoint(), None, timeout=5)
    # The adapter cuts names at 255 characters.
    assert [model.id for model in found] == rows[: catalog.MAX_MODELS]


def test_numbers_that_the_database_cannot_hold_are_left_out(server: Provider) -> None:
    discovered(server, Model("a", context_window=2**31, dimensions=-1), Model("b", context_window=2**31 - 1))
    assert dict(UpstreamModel.objects.values_list("name", "context_window")) == {"a": None, "b": 2**31 - 1}


def test_the_number_of_models_is_kept_with_the_health(server: Provider) -> None:
    ProviderHealth.objects.create(provider=server)
    refresh(server)
    assert ProviderHealth.objects.get(pk=server.pk).models_count == 2


def test_the_command_asks_those_that_are_named(
    server: Provider, provide: Callable[..., Provider], upstream: Upstream, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = provide("broken", "http://127.0.0.1:9/v1")
    call_command("sync_models", "server")
    assert capsys.readouterr().out == "server: 2 models, 2 new, 0 changed, 0 gone\n"
    with pytest.raises(SystemExit):
        call_command("sync_models", "broken", "server")
    said = capsys.readouterr()
    assert said.out.startswith("server: 2 models, 0 new")
    assert said.err.startswith("broken: ")
    assert names(broken) == set()


def test_the_probe_command_says_how_each_one_is(
    server: Provider, provide: Callable[..., Provider], capsys: pytest.CaptureFixture[str]
) -> None:
    provide("broken", "http://127.0.0.1:9/v1")
    call_command("probe", "server")
    assert capsys.readouterr().out == "server: online 200 2 models\n"
    with pytest.raises(SystemExit):
        call_command("probe")
    said = capsys.readouterr().out
    assert "broken: unreachable" in said
    assert "server: online" in said
    assert ProviderHealth.objects.get(provider=server).health_status == "healthy"
