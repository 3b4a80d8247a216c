"""Which price a name has at a moment."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from genai_prices.data import providers

from proxy import price_source
from proxy.models.prices import price_of
from proxy.price_book import FOREVER, Dated, Listed, Override, PriceBook, check_match
from proxy.price_source import LISTED, vendor_of
from proxy.pricing import Price, Rate

pytestmark = pytest.mark.no_database
NOW = 1_790_000_000.0
NOON = datetime(2026, 11, 25, 12, tzinfo=UTC).timestamp()


def price(id: int, base: int = 1) -> Price:
    return Price(id, Rate(base))


def always(id: int) -> Dated:
    return Dated(0.0, FOREVER, price(id))


def id_of(
    book: PriceBook, model: str, *, provider_id: int = 1, vendor: str = "v", now: float = NOW
) -> int | None:
    found = book.price(provider_id, vendor, model, now)
    return None if found is None else found.id


@pytest.fixture(scope="module")
def package() -> tuple[PriceBook, dict[tuple[str, int], str]]:
    """The package's list, and which model a price of it is of."""
    _, models = price_source.read()
    lists: dict[str, list[Listed]] = {}
    names = {}
    for number, model in enumerate(models):
        names[model.vendor, number] = model.name
        dated = Dated(0.0, FOREVER, price_of(number, model.offers[-1].rates))
        lists.setdefault(model.vendor, []).append(Listed(model.match, model.name, (dated,)))
    return PriceBook(lists), names


def texts_in(clause: Any) -> Iterator[str]:
    for value in vars(clause).values():
        if isinstance(value, list):
            for each in value:
                yield from texts_in(each)
        else:
            yield (
                value.strip("^$")
                .replace("\\", "")
                .replace("d{8}", "20260102")
                .replace("d{4}-d{2}-d{2}", "2026-01-02")
            )


def test_a_name_means_the_model_that_genai_prices_takes_it_for(package: Any) -> None:
    book, names = package
    asked = 0
    for provider in providers:
        if provider.id not in LISTED:
            continue
        listed = {name for (vendor, _), name in names.items() if vendor == provider.id}
        number = sorted(LISTED).index(provider.id)
        for info in provider.models:
            for text in (info.id, *texts_in(info.match), f"{info.id}-2026-01-02", f"{info.id}-20260102"):
                theirs = provider.find_model(text)
                expected = theirs.id if theirs is not None and theirs.id in listed else None
                ours = id_of(book, text, provider_id=number, vendor=provider.id)
                assert (None if ours is None else names[provider.id, ours]) == expected, (provider.id, text)
                asked += 1
    assert asked > 3000


@pytest.mark.parametrize(
    ("vendor", "name", "model"),
    [
        ("openai", "gpt-4o-2024-08-06", "gpt-4o"),
        ("openai", "GPT-4o", "gpt-4o"),
        ("openrouter", "openai/gpt-4o", "openai/gpt-4o"),
        ("anthropic", "claude-sonnet-4-5-20250929", "claude-sonnet-4-5"),
        ("mistral", "mistral-large-latest", "mistral-large"),
    ],
)
def test_names_as_people_write_them(package: Any, vendor: str, name: str, model: str) -> None:
    book, names = package
    number = id_of(book, name, vendor=vendor)
    assert number is not None and names[vendor, number] == model


def test_what_is_not_listed_has_no_price(package: Any) -> None:
    book, _ = package
    assert id_of(book, "no-such-model", vendor="openai") is None
    assert id_of(book, "gpt-4o", vendor="no-such-vendor") is None
    assert id_of(book, "whisper-1", vendor="openai") is None


def test_what_a_person_said_wins_and_the_most_special_first() -> None:
    lists = {"v": [Listed(None, "gpt-4o", (always(1),))]}
    said = [Override("*", always(2)), Override("gpt-*", always(3)), Override("gpt-4o", always(4))]
    book = PriceBook(lists, {7: said})

    assert id_of(book, "gpt-4o", provider_id=7) == 4
    assert id_of(book, "gpt-5", provider_id=7) == 3
    assert id_of(book, "o3", provider_id=7) == 2
    assert id_of(book, "gpt-4o", provider_id=8) == 1


def test_a_name_with_brackets_is_itself_and_no_pattern() -> None:
    book = PriceBook({}, {7: [Override("m[fast]", always(2))]})
    assert id_of(book, "m[fast]", provider_id=7) == 2
    assert id_of(book, "mf", provider_id=7) is None


def test_a_price_holds_from_its_moment_until_its_end_also_when_it_was_asked_for_before() -> None:
    lists = {"v": [Listed(None, "m", (Dated(NOW + 10, FOREVER, price(2)), Dated(0.0, FOREVER, price(1))))]}
    book = PriceBook(lists, {7: [Override("m", Dated(NOW + 5, NOW + 20, price(3)))]})

    moments = (NOW, NOW + 5, NOW + 19.9, NOW + 20)
    assert [id_of(book, "m", provider_id=7, now=moment) for moment in moments] == [1, 3, 3, 2]
    assert [id_of(book, "m", provider_id=8, now=moment) for moment in moments] == [1, 1, 2, 2]


def test_hours_of_the_day_have_their_own_price_also_over_midnight() -> None:
    hours = ((3600, 7200, price(2)), (79_200, 1800, price(3)))
    book = PriceBook({"v": [Listed(None, "m", (Dated(0.0, FOREVER, price(1), hours),))]})
    midnight = NOON - 12 * 3600

    at = [id_of(book, "m", now=midnight + second) for second in (0, 1800, 3600, 7199, 7200, 80_000)]
    assert at == [3, 1, 2, 2, 1, 3]


def test_names_that_nobody_lists_fill_no_memory_for_ever() -> None:
    book = PriceBook()
    for number in range(10_050):
        book.price(1, "v", f"m{number}", NOW)
    assert len(book._known) == 10_000


@pytest.mark.parametrize(
    "clause",
    [
        [],
        {},
        {"equals": 1},
        {"or": "x"},
        {"or": [None]},
        {"like": "x"},
        {"regex": "("},
        {"equals": "a", "or": []},
    ],
)
def test_what_is_no_clause_is_found_when_it_is_read(clause: Any) -> None:
    with pytest.raises(ValueError, match="not a"):
        check_match(clause)


@pytest.mark.parametrize(
    ("kind", "url", "vendor"),
    [
        ("openai", "https://proxy.example.org/v1", "openai"),
        ("openai-compatible", "http://127.0.0.1:8000/v1", "openai-compatible"),
        ("openai-compatible", "https://api.x.ai/v1", "x-ai"),
        ("openai-compatible", "https://api.openai.com/v1", "openai"),
        ("ollama", "http://localhost:11434", "ollama"),
    ],
)
def test_a_vendor_without_a_kind_is_known_by_its_address(kind: str, url: str, vendor: str) -> None:
    assert vendor_of(kind, url) == vendor
