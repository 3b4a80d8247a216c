"""The table of prices: taken over from the package, overridden by people, and never rewritten."""

from __future__ import annotations

import itertools
import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from datetime import time as clock
from decimal import Decimal
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import IntegrityError, transaction
from django.utils import timezone
from genai_prices import types as theirs

from audit.changes import NotInChanges, changes
from audit.models import Entry, Head
from providers.models import Provider, UpstreamModel
from proxy import prices, tasks
from proxy.models import ModelPrice, PriceList
from proxy.models.prices import BEGINNING, PriceSource
from proxy.price_source import FREE_KINDS, PACKAGE
from proxy.snapshot import build
from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.django_db
Shelf = Callable[..., None]


def model(name: str, prices: Any, match: Any = None) -> theirs.ModelInfo:
    return theirs.ModelInfo(id=name, match=match or theirs.ClauseEquals(equals=name), prices=prices)


def costs(prompt: str, completion: str = "2", **more: Any) -> theirs.ModelPrice:
    return theirs.ModelPrice(input_mtok=Decimal(prompt), output_mtok=Decimal(completion), **more)


def since(day: date, prices: theirs.ModelPrice) -> theirs.ConditionalPrice:
    return theirs.ConditionalPrice(theirs.StartDateConstraint(start_date=day), prices=prices)


@pytest.fixture
def shelf(monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """Puts a list with these models of OpenAI in the place of the package's."""

    def put(*models: Any, vendor: str = "openai") -> None:
        providers = [theirs.Provider(id=vendor, name=vendor, api_pattern="", models=list(models))]
        monkeypatch.setitem(sys.modules, "genai_prices.data", SimpleNamespace(providers=providers))

    return put


def table() -> list[tuple[str, int]]:
    """(model, prompt) of the list's rows, oldest first."""
    rows = ModelPrice.objects.filter(source=PriceSource.PACKAGE).order_by("id")
    return list(rows.values_list("model", "prompt"))


def vendor(slug: str = "openai", **fields: Any) -> Provider:
    provider = Provider.objects.get(slug=slug)
    with changes(actor=None, via="system"):
        for name, value in {"enabled": True, **fields}.items():
            setattr(provider, name, value)
        provider.save()
    return provider


def override(provider: Provider, name: str, prompt: int = 5, **fields: Any) -> ModelPrice:
    row = ModelPrice(model=name, prompt=prompt, completion=prompt, **fields)
    with changes(actor=None, via="system"):
        prices.add_override(row, provider)
    return row


def present(provider: Provider, name: str) -> tuple[int, int] | None:
    """(row, prompt rate) by a snapshot that is built now."""
    found = build().price(provider.pk, name)
    return None if found is None else (found.id, found.prompt.base)


# -- taken over from the package -----------------------------------------------------------------------------------------


def test_the_installed_list_is_taken_over_whole_with_one_entry() -> None:
    before = Head.objects.get().seq
    done = prices.refresh(via="system")

    assert done.added == ModelPrice.objects.count() > 1500
    assert done.package_version == PriceList.objects.get().package_version != ""
    (entry,) = Entry.objects.filter(seq__gt=before)
    assert (entry.action, entry.entity_type) == ("add_prices", "price_list")
    assert entry.changes == {"rows": [0, done.added], "package_version": [None, done.package_version]}
    four = ModelPrice.objects.get(vendor="openai", model="gpt-4o")
    assert (four.prompt, four.completion, four.cached) == (2_500_000_000, 10_000_000_000, 1_250_000_000)
    assert (
        not ModelPrice.objects.filter(prompt=0, completion=0, request=0, source="package")
        .exclude(model__endswith=":free")
        .exclude(vendor="openrouter")
        .exists()
    )


WITHOUT_NETWORK = """
import sys
asked = []
def note(event, args):
    if event in {"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"}:
        asked.append(event)
sys.addaudithook(note)
import django
django.setup()
import proxy.prices
from proxy import price_source
print(len(price_source.read()[1]) > 500, asked, [t.name for t in __import__("threading").enumerate()])
"""


def test_f47_neither_the_start_nor_reading_the_list_asks_the_network() -> None:
    command = [sys.executable, "-c", WITHOUT_NETWORK]
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "config.settings"}
    done = subprocess.run(
        command, cwd=REPOSITORY, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout.splitlines()[-1:] == ["True [] ['MainThread']"], done.stderr


def test_taking_it_over_again_changes_nothing() -> None:
    prices.refresh(via="system")
    rows, head = list(ModelPrice.objects.order_by("id").values_list()), Head.objects.get().seq

    assert prices.refresh(via="task").added == 0
    assert prices.refresh_if_new(via="system").added == 0
    assert (list(ModelPrice.objects.order_by("id").values_list()), Head.objects.get().seq) == (rows, head)


def test_a_price_that_is_new_is_a_new_row_from_now_on(shelf: Shelf) -> None:
    shelf(model("a", costs("1")), model("b", costs("3")))
    prices.refresh(via="system")
    old = ModelPrice.objects.filter(model="a").values().get()
    shelf(model("a", costs("1.5")), model("b", costs("3")), model("c", costs("7")))
    began = timezone.now()

    assert prices.refresh(via="task").added == 2
    assert table() == [("a", 10**9), ("b", 3 * 10**9), ("a", 1_500_000_000), ("c", 7 * 10**9)]
    assert ModelPrice.objects.filter(pk=old["id"]).values().get() == old
    assert ModelPrice.objects.get(model="a", prompt=1_500_000_000).effective_from >= began
    assert present(vendor(), "a") == (ModelPrice.objects.get(prompt=1_500_000_000).pk, 1_500_000_000)


def test_a_model_that_the_list_no_longer_has_keeps_its_price(shelf: Shelf) -> None:
    shelf(model("a", costs("1")), model("b", costs("3")))
    prices.refresh(via="system")
    shelf(model("b", costs("3")))

    assert prices.refresh(via="task").added == 0
    assert present(vendor(), "a") is not None


def test_history_and_what_is_to_come_are_taken_over_with_their_dates(shelf: Shelf) -> None:
    today = timezone.now().date()
    past, to_come = today - timedelta(days=40), today + timedelta(days=40)
    shelf(
        model(
            "a",
            [theirs.ConditionalPrice(prices=costs("1")), since(past, costs("2")), since(to_come, costs("3"))],
        )
    )
    prices.refresh(via="system")

    rows = list(ModelPrice.objects.filter(model="a").order_by("prompt"))
    dates = [BEGINNING, *(datetime.combine(day, clock(), UTC) for day in (past, to_come))]
    assert [row.effective_from for row in rows] == dates
    provider = vendor()
    assert present(provider, "a") == (rows[1].pk, 2 * 10**9)
    later = build().prices.price(provider.pk, "openai", "a", dates[2].timestamp())
    assert later is not None and later.id == rows[2].pk
    assert prices.refresh(via="task").added == 0


def test_hours_of_the_day_and_tiers_are_taken_over(shelf: Shelf) -> None:
    tiers = theirs.TieredPrices(base=Decimal("1"), tiers=[theirs.Tier(start=200_000, price=Decimal("2"))])
    hours = theirs.TimeOfDateConstraint(clock(1), clock(4))
    shelf(
        model(
            "a",
            [
                theirs.ConditionalPrice(
                    prices=theirs.ModelPrice(input_mtok=tiers, requests_kcount=Decimal("12"))
                ),
                theirs.ConditionalPrice(hours, prices=costs("9")),
            ],
        )
    )
    prices.refresh(via="system")
    row = ModelPrice.objects.get(model="a")

    assert row.tiers == {"prompt": [[200_000, 2 * 10**9]]}
    assert (row.request, row.prompt) == (12_000_000, 10**9)
    assert [(each["from"], each["until"], each["prompt"]) for each in row.hours] == [
        (3600, 14_400, 9 * 10**9)
    ]
    book, night = build_book(vendor()), datetime(2030, 1, 1, 2, tzinfo=UTC).timestamp()
    assert book(night) == 9 * 10**9
    assert book(night + 3 * 3600) == 10**9


def build_book(provider: Provider) -> Callable[[float], int | None]:
    taken = build().prices

    def rate(now: float) -> int | None:
        found = taken.price(provider.pk, provider.kind, "a", now)
        return None if found is None else found.prompt.base

    return rate


def test_what_the_list_says_nothing_of_is_unknown_and_what_it_calls_free_is_free(shelf: Shelf) -> None:
    nothing, audio = theirs.ModelPrice(), theirs.ModelPrice(audio_hours=Decimal("3"))
    shelf(model("a", costs("1")), model("b", nothing), model("c", audio), model("d:free", nothing))
    prices.refresh(via="system")
    assert table() == [("a", 10**9), ("d:free", 0)]


def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "genai_prices.data", None)


BROKEN: dict[str, Callable[[pytest.MonkeyPatch, Shelf], None]] = {
    "not there": lambda patch, shelf: absent(patch),
    "empty": lambda patch, shelf: patch.setitem(
        sys.modules, "genai_prices.data", SimpleNamespace(providers=[])
    ),
    "of another shape": lambda patch, shelf: patch.setitem(
        sys.modules, "genai_prices.data", SimpleNamespace(providers={"openai": 1})
    ),
    "without models that we know": lambda patch, shelf: shelf(model("a", costs("9")), vendor="nobody"),
    "all free": lambda patch, shelf: shelf(model("a", costs("0", "0"))),
    "a negative price": lambda patch, shelf: shelf(model("b", costs("3")), model("a", costs("-1"))),
    "no number": lambda patch, shelf: shelf(model("b", costs("3")), model("a", costs("NaN"))),
    "absurdly dear": lambda patch, shelf: shelf(model("b", costs("3")), model("a", costs("1e12"))),
    "a rule that is none": lambda patch, shelf: shelf(model("a", costs("1"), theirs.ClauseRegex(regex="("))),
}


@pytest.mark.parametrize("how", BROKEN.values(), ids=BROKEN.keys())
def test_f47_a_broken_list_changes_no_price_and_is_said(
    how: Callable[..., None], shelf: Shelf, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shelf(model("a", costs("1")))
    prices.refresh(via="system")
    rows = list(ModelPrice.objects.order_by("id").values_list())
    how(monkeypatch, shelf)
    with caplog.at_level(logging.ERROR):
        done = prices.refresh(via="task")

    assert done.problem and done.added == 0
    assert list(ModelPrice.objects.order_by("id").values_list()) == rows
    assert PriceList.objects.get().problem == done.problem
    assert "cannot be used" in caplog.text
    assert build().price_list_broken
    assert Entry.objects.order_by("seq").last().action == "broken_price_list"  # type: ignore[union-attr]
    with pytest.raises(CommandError, match="cannot be used"):
        call_command("refresh_prices")
    assert Entry.objects.filter(action="broken_price_list").count() == 1


def test_f47_a_list_that_is_whole_again_ends_it(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    absent(monkeypatch)
    prices.refresh(via="task")
    shelf(model("a", costs("1")))

    assert prices.refresh_if_new(via="system").added == 1 + len(FREE_KINDS)
    assert PriceList.objects.get().problem == ""
    assert not build().price_list_broken
    assert Entry.objects.order_by("seq").last().action == "mended_price_list"  # type: ignore[union-attr]


def test_the_command_says_how_many_are_new(shelf: Shelf) -> None:
    shelf(model("a", costs("1")))
    out = StringIO()
    call_command("refresh_prices", stdout=out)
    assert out.getvalue().startswith(f"{1 + len(FREE_KINDS)} new prices from {PACKAGE} ")


def test_the_task_looks_once_a_day(shelf: Shelf) -> None:
    shelf(model("a", costs("1")))
    tasks.refresh_prices()
    shelf(model("a", costs("1")), model("b", costs("1")))
    tasks.refresh_prices()
    assert table() == [("a", 10**9)]


# -- what runs here ------------------------------------------------------------------------------------------------------


def test_what_we_run_ourselves_costs_nothing_by_a_row_that_says_so(shelf: Shelf) -> None:
    shelf(model("a", costs("1")))
    prices.refresh(via="system")
    with changes(actor=None, via="system"):
        box = Provider.objects.create(name="Box", kind="vllm", base_url="http://127.0.0.1:9")
        echo = Provider.objects.create(name="Echo", kind="echo", base_url="https://echo.invalid")
        grok = Provider.objects.create(name="Grok", kind="openai-compatible", base_url="https://api.x.ai/v1")

    for provider in (box, echo):
        row = ModelPrice.objects.get(vendor=provider.kind)
        assert (row.source, row.prompt, row.completion) == ("self-hosted", 0, 0)
        assert present(provider, "whatever/it-is") == (row.pk, 0)
    assert present(grok, "whatever/it-is") is None


# -- what people say -----------------------------------------------------------------------------------------------------


def test_an_override_wins_until_it_is_ended_and_stays_to_be_read(shelf: Shelf) -> None:
    shelf(model("a", costs("1")))
    prices.refresh(via="system")
    provider = vendor()
    listed = present(provider, "a")
    row = override(provider, "a", 5)
    assert present(provider, "a") == (row.pk, 5)

    with changes(actor=None, via="system"):
        prices.end_override(row)

    assert present(provider, "a") == listed
    row.refresh_from_db()
    assert row.effective_until is not None and row.prompt == 5
    assert [entry.action for entry in Entry.objects.filter(entity_type="model_price").order_by("seq")] == [
        "add_price",
        "update_price",
    ]


def test_an_override_is_of_one_provider_and_its_name_may_hold_a_star(shelf: Shelf) -> None:
    provider, other = vendor(), vendor("groq")
    row = override(provider, "gpt-*")
    assert present(provider, "gpt-9") == (row.pk, 5)
    assert present(provider, "o9") is None
    assert present(other, "gpt-9") is None


def test_a_second_override_of_a_name_ends_the_first(shelf: Shelf) -> None:
    provider = vendor()
    first, kept = override(provider, "a", 5), override(provider, "a*", 6)
    second = override(provider, "a", 7)
    first.refresh_from_db()
    kept.refresh_from_db()

    assert first.effective_until == second.effective_from
    assert kept.effective_until is None
    assert present(provider, "a") == (second.pk, 7)
    with changes(actor=None, via="system"):
        prices.end_override(second)
    assert present(provider, "a") == (kept.pk, 6)


def timetable(provider: Provider, now: datetime) -> list[tuple[float, int | None]]:
    """(day, rate) of each day from `now` on at whose beginning another rate of the model `a` holds."""
    found: list[tuple[float, int | None]] = []
    book = build_book(provider)
    for day in range(60):
        rate = book((now + timedelta(days=day, seconds=1)).timestamp())
        if not found or found[-1][1] != rate:
            found.append((day, rate))
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        # What begins later stays, whether this one has an end or not.
        ([(1, 30, None), (2, 0, 3)], [(0, 2), (3, None), (30, 1)]),
        ([(1, 30, None), (2, 0, None)], [(0, 2), (30, 1)]),
        ([(1, 30, 40), (2, 0, None)], [(0, 2), (30, 1), (40, None)]),
        # What holds goes on behind one with an end.
        ([(1, 0, None), (2, 0, 3)], [(0, 2), (3, 1)]),
        ([(1, 0, None), (2, 5, 8), (3, 6, 7)], [(0, 1), (5, 2), (6, 3), (7, 2), (8, 1)]),
        ([(1, 0, 10), (2, 5, 8)], [(0, 1), (5, 2), (8, 1), (10, None)]),
        ([(1, 2, None), (2, 0, 3)], [(0, 2), (3, 1)]),
        ([(1, 0, 3), (2, 3, 6), (3, 1, 5)], [(0, 1), (1, 3), (5, 2), (6, None)]),
        # The same beginning is a correction, which takes the whole of its place.
        ([(1, 30, None), (2, 30, None)], [(0, None), (30, 2)]),
        ([(1, 30, None), (2, 30, None), (3, 0, None)], [(0, 3), (30, 2)]),
        ([(1, 0, None), (2, 0, None)], [(0, 2)]),
    ],
)
def test_what_overrides_of_a_name_say_of_other_times_stays(
    said: list[tuple[int, int, int | None]], expected: list[tuple[float, int | None]]
) -> None:
    provider, now = vendor(), timezone.now()
    for rate, begin, end in said:
        until = None if end is None else now + timedelta(days=end)
        override(provider, "a", rate, effective_from=now + timedelta(days=begin), effective_until=until)
    assert timetable(provider, now) == expected
    held = [
        (row.effective_from, row.effective_until or datetime.max.replace(tzinfo=UTC))
        for row in ModelPrice.objects.order_by("effective_from")
        if row.effective_from != row.effective_until
    ]
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(held))


def test_an_override_that_is_to_come_holds_when_it_comes() -> None:
    provider = vendor()
    row = override(provider, "a", 5, effective_from=timezone.now() + timedelta(days=1))
    snapshot = build()
    assert snapshot.price(provider.pk, "a") is None
    found = snapshot.prices.price(provider.pk, "openai", "a", time.time() + 2 * 86_400)
    assert found is not None and found.id == row.pk


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"effective_from": timezone.now() - timedelta(days=1)}, "effective_from"),
        ({"effective_until": timezone.now() - timedelta(days=1)}, "effective_until"),
        ({"model": ""}, "model"),
        ({"prompt": -1}, "__all__"),
        ({"prompt": 10**16}, "prompt"),
    ],
)
def test_an_override_that_makes_no_sense_is_refused(fields: dict[str, Any], wrong: str) -> None:
    row = ModelPrice(**{"model": "a", "prompt": 1, "completion": 1, **fields})
    with changes(actor=None, via="system"), pytest.raises(ValidationError) as caught:
        prices.add_override(row, vendor())
    assert wrong in caught.value.message_dict
    assert not ModelPrice.objects.exists()


def test_only_an_override_is_ended_and_only_once(shelf: Shelf) -> None:
    shelf(model("a", costs("1")))
    prices.refresh(via="system")
    row = override(vendor(), "a")
    with changes(actor=None, via="system"):
        prices.end_override(row)
        for each in (row, ModelPrice.objects.get(model="a", source="package")):
            with pytest.raises(ValidationError):
                prices.end_override(each)


def test_a_price_is_not_written_past_the_audit_log() -> None:
    with pytest.raises(NotInChanges):
        prices.add_override(ModelPrice(model="a", prompt=1, completion=1), vendor())


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": -1}, {"cached": -1}, {"request": 10**16}, {"source": "override"}, {"model": ""},
        {"effective_from": datetime(2026, 1, 2, tzinfo=UTC), "effective_until": datetime(2026, 1, 1, tzinfo=UTC)},
    ],
)  # fmt: skip
def test_the_database_refuses_a_price_that_cannot_be(fields: dict[str, Any]) -> None:
    good = {"source": "package", "vendor": "openai", "model": "a", "prompt": 1, "completion": 1}
    with pytest.raises(IntegrityError), transaction.atomic():
        ModelPrice.objects.bulk_create([ModelPrice(**{**good, **fields})])


# -- read into a snapshot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nonsense",
    [
        {"tiers": {"prompt": [["x", 1]]}}, {"tiers": [1]}, {"hours": [{"from": 1}]}, {"match": {"like": "x"}},
        {"tiers": {"prompt": 5}}, {"hours": 3},
    ],
)  # fmt: skip
def test_a_row_that_makes_no_sense_is_left_out_and_the_others_hold(nonsense: dict[str, Any]) -> None:
    good = {
        "source": "package",
        "vendor": "openai",
        "prompt": 1,
        "completion": 1,
        "effective_from": BEGINNING,
    }
    ModelPrice.objects.bulk_create(
        [ModelPrice(model="a", **{**good, **nonsense}), ModelPrice(model="b", **good)]
    )
    provider = vendor()
    assert present(provider, "a") is None
    assert present(provider, "b") is not None


def test_ten_thousand_models_and_the_whole_list_are_a_snapshot_soon() -> None:
    prices.refresh(via="system")
    provider, router = vendor(), vendor("openrouter")
    now = timezone.now()
    UpstreamModel.objects.bulk_create(
        UpstreamModel(provider=router, name=f"org/model-{number}") for number in range(10_000)
    )
    ModelPrice.objects.bulk_create(
        [
            ModelPrice(
                source="override", provider_id=provider.pk, provider="openai", model=f"m-{number}", prompt=number,
                completion=1, effective_from=now,
            )
            for number in range(10_000)
        ],
        batch_size=500,
    )  # fmt: skip
    began = time.process_time()
    snapshot = build()
    took = time.process_time() - began

    found = snapshot.price(provider.pk, "m-77")
    assert found is not None and found.prompt.base == 77
    assert snapshot.price(router.pk, "openai/gpt-4o") is not None
    print(
        f"measured: a snapshot of 10,000 models, 10,000 overrides and the price list took {took:.3f} s of CPU"
    )
    assert took < 2.0
