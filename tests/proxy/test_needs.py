"""What a request needs, held against what is known of models."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.needs import (
    UNKNOWN,
    ModelFacts,
    Needs,
    choices,
    completion_limit,
    misfit,
    needs_of,
    same_dimensions,
)

pytestmark = pytest.mark.no_database

TEXT = [{"role": "user", "content": "hello"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 4_000_000}}


def facts(window: int | None = None, *capabilities: str) -> ModelFacts:
    return ModelFacts(context_window=window, capabilities=frozenset(capabilities))


def test_a_plain_request_needs_nothing_but_room() -> None:
    assert needs_of({"messages": TEXT, "max_tokens": 100}) == Needs(prompt_bytes=5, max_tokens=100)
    assert needs_of({"messages": TEXT, "max_tokens": 100}).tokens == 101


def test_what_is_asked_for_is_needed() -> None:
    seen = needs_of({"messages": [{"role": "user", "content": [{"type": "text", "text": "é"}, IMAGE]}]})
    assert seen == Needs(prompt_bytes=2, vision=True)
    assert needs_of({"messages": TEXT, "tools": [{"type": "function"}]}).tools
    assert needs_of({"messages": TEXT, "response_format": {"type": "json_schema"}}).json_schema
    assert not needs_of({"messages": TEXT, "response_format": {"type": "json_object"}}).json_schema


@pytest.mark.parametrize(
    "body",
    [
        {}, {"messages": 3}, {"messages": [3, None, {"content": 3}, {"content": [3, {"type": 3, "text": 3}]}]},
        {"messages": [], "max_tokens": True, "max_completion_tokens": -1, "response_format": 3, "tools": None},
        {"messages": [{"content": [{"type": "text"}]}]},
    ],
)  # fmt: skip
def test_a_body_of_nonsense_needs_nothing(body: dict[str, Any]) -> None:
    assert needs_of(body) == Needs()


@pytest.mark.parametrize(
    ("body", "limit", "answers"),
    [
        ({"max_tokens": 200, "max_completion_tokens": 1, "n": 3}, 200, 3),
        ({"max_tokens": 1, "max_completion_tokens": 200, "n": 0}, 200, 1),
        ({"max_tokens": 200.0, "n": 3.0}, 200, 3),
        ({"max_tokens": 0.5, "max_completion_tokens": float("inf"), "n": True}, 0, 1),
    ],
)
def test_the_largest_limit_that_is_given_counts(body: dict[str, Any], limit: int, answers: int) -> None:
    assert (completion_limit(body), choices(body)) == (limit, answers)


def test_only_what_certainly_does_not_fit_is_refused() -> None:
    window = facts(1000)
    assert misfit(window, Needs(prompt_bytes=4 * 1000)) is None
    assert misfit(window, Needs(prompt_bytes=8 * 1000)) is None
    assert misfit(window, Needs(prompt_bytes=100, max_tokens=10**6)) is None
    found = misfit(window, Needs(prompt_bytes=8 * 1001))
    assert found is not None
    assert (found.what, found.text) == ("window", "at least 1001 tokens, and its window has 1000")


def test_what_is_not_known_is_not_held_against_a_model() -> None:
    everything = Needs(prompt_bytes=10**9, tools=True, vision=True, json_schema=True)
    assert misfit(UNKNOWN, everything) is None
    assert misfit(facts(None, "chat", "generate"), everything) is None


def test_a_list_of_abilities_without_the_needed_one_speaks_against_it() -> None:
    assert misfit(facts(None, "function_calling"), Needs(vision=True)) is not None
    assert misfit(facts(None, "vision"), Needs(tools=True)) is not None
    assert misfit(facts(None, "tools", "vision"), Needs(tools=True, vision=True)) is None
    # Almost nobody lists schemas, so only a list that speaks of JSON tells anything.
    assert misfit(facts(None, "tools"), Needs(json_schema=True)) is None
    assert misfit(facts(None, "json_mode"), Needs(json_schema=True)) is not None
    assert misfit(facts(None, "json_mode", "structured_outputs"), Needs(json_schema=True)) is None


def test_only_vectors_of_the_same_length_may_stand_in() -> None:
    short, long = ModelFacts(dimensions=384), ModelFacts(dimensions=1024)
    assert same_dimensions("a", short, "b", short)
    assert not same_dimensions("a", short, "b", long)
    assert not same_dimensions("a", short, "a", long)
    assert same_dimensions("a", short, "a", UNKNOWN)
    assert not same_dimensions("a", UNKNOWN, "b", UNKNOWN)
