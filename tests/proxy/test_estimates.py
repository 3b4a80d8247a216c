"""What is counted where nobody told: close to a real vocabulary, and in a time that does not grow with the prompt."""

from __future__ import annotations

import time
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proxy import estimates
from tests.support import answers
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

ENGLISH = (
    "When the provider breaks off in the middle of an answer, the gateway has two choices: it can tell the caller honestly that "
    "the stream is broken, or it can ask somebody else to go on where the first one stopped. Neither is easy."
)
GERMAN = (
    "Die Bundesregierung hat gestern angekündigt, dass die Verhandlungen über das Gesetz zur Digitalisierung der Verwaltung noch "
    "vor der Sommerpause abgeschlossen werden sollen."
)
RUSSIAN = "Правительство вчера объявило, что переговоры о законе по цифровизации управления должны завершиться до летних каникул."  # noqa: RUF001  # it is Russian
CHINESE = (
    "政府昨天宣布，关于行政数字化法律的谈判将在夏季休会之前完成。各地方此前对可能由市镇承担的费用表示担忧。"  # noqa: RUF001  # as above
)
JAPANESE = "政府は昨日、行政のデジタル化に関する法律の交渉を夏休みの前に終える予定だと発表しました。"
CODE = 'for index, block in enumerate(blocks):\n    if not block.startswith(b"data: "):\n        continue\n    total += len(block[6:])\n'
TABLE = "2024-01-15,1532.77,EUR,0.0031,9981772635\n2024-01-16,1498.02,EUR,0.0029,9981772640\n"
ODD = "iVBORw0KGgoAAAANSUhEUgAAAAUAAAAFCAYAAACNbyblAAAAHElEQVQI12P4"

COUNTED = {
    "english": (ENGLISH, 49, 0.13),
    "german": (GERMAN, 27, 0.13),
    "russian": (RUSSIAN, 26, 0.25),
    "chinese": (CHINESE, 35, 0.13),
    "japanese": (JAPANESE, 35, 0.13),
    "code": (CODE, 31, 0.13),
    "a table": (TABLE, 48, 0.13),
    "base64": (ODD, 31, 0.25),
}
"""Text, its tokens in o200k_base, and by which part of that an estimate may be wrong."""


@pytest.mark.parametrize(("text", "tokens", "wrong"), COUNTED.values(), ids=COUNTED.keys())
def test_a_text_is_estimated_as_a_real_vocabulary_counts_it(text: str, tokens: int, wrong: float) -> None:
    assert estimates.of_text(text) == pytest.approx(tokens, rel=wrong)


def prompt(content: Any, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **more}


def test_a_long_prompt_is_estimated_from_slices_of_all_of_it() -> None:
    half = ENGLISH * 400 + CHINESE * 800
    whole = estimates.of_text(half)
    assert estimates.of_request(prompt(half)) == pytest.approx(whole, rel=0.1)


def test_many_messages_are_estimated_from_some_of_them() -> None:
    message = {"role": "user", "content": ENGLISH}
    ten = estimates.of_request({"messages": [message] * 10}) - estimates.PRIMING
    assert estimates.of_request({"messages": [message] * 20_000}) == pytest.approx(2000 * ten, rel=0.05)


LARGE = {
    "one text": prompt(ENGLISH * 50_000),
    "no word": prompt("a" * 10_000_000),
    "messages": {"messages": [{"role": "user", "content": "hi"}] * 90_000},
    "parts": prompt([{"type": "text", "text": "hi"}] * 90_000),
    "tools": prompt(
        "hi", tools=[{"function": {"name": "f", "parameters": {str(n): n for n in range(90)}}}] * 900
    ),
    "one tool": prompt("hi", tools=[{"function": {str(n): {"type": "object"} for n in range(90_000)}}]),
}


@pytest.mark.parametrize("body", LARGE.values(), ids=LARGE.keys())
def test_no_request_is_too_large_to_be_estimated_in_a_few_milliseconds(body: dict[str, Any]) -> None:
    times = []
    for _ in range(5):
        began = time.thread_time()
        assert estimates.of_request(body) > 0
        times.append(time.thread_time() - began)
    assert min(times) < 0.02


def test_only_words_count_and_not_the_json_around_them() -> None:
    bare = estimates.of_request(prompt(ENGLISH))
    assert estimates.of_request(prompt([{"type": "text", "text": ENGLISH}])) == bare
    assert estimates.of_request(prompt(ENGLISH, metadata={"note": "x" * 10_000}, user="somebody")) == bare


def test_pictures_and_sounds_have_a_flat_figure_whatever_their_size() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    small = {"type": "image_url", "image_url": {"url": "https://x.example/y.png", "detail": "low"}}
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}}
    nothing = estimates.of_request(prompt([]))
    for part, flat in ((picture, estimates.IMAGE), (small, estimates.SMALL_IMAGE), (sound, estimates.AUDIO)):
        assert estimates.of_request(prompt([part])) - nothing == flat


def test_tools_count() -> None:
    tool = {"type": "function", "function": {"name": "weather", "description": ENGLISH, "parameters": {}}}
    more = estimates.of_request(prompt("hi", tools=[tool])) - estimates.of_request(prompt("hi"))
    assert more > estimates.PER_TOOL + estimates.of_text(ENGLISH)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "text", "content", "image_url"]), inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)  # How long one takes is the machine's business.
@given(content=anything, tools=anything, calls=anything, name=anything)
def test_whatever_is_in_a_request_is_estimated(content: Any, tools: Any, calls: Any, name: Any) -> None:
    message = {"role": "user", "content": content, "tool_calls": calls, "name": name}
    assert estimates.of_request({"messages": [message], "tools": tools}) >= estimates.PRIMING


@pytest.mark.parametrize(
    ("events", "size", "tokens"), [(100, 450, 100), (100, 800, 100), (10, 450, 100), (0, 0, 0)]
)
def test_an_event_is_a_token_unless_its_text_is_long(events: int, size: int, tokens: int) -> None:
    assert estimates.of_stream(events, size) == tokens


def test_a_stream_whose_events_hold_many_tokens_is_estimated_by_its_text(
    pair: House, upstream: Upstream
) -> None:
    upstream.behave(answers.ok(texts=[ENGLISH, ENGLISH, ENGLISH], usage=False))
    pair.ask(None, stream=True)
    record = pair.records()[0]
    assert record["tokens_source"] == "estimated"
    assert record["completion_tokens"] == pytest.approx(3 * COUNTED["english"][1], rel=0.2)


@pytest.mark.parametrize(
    "end", [[], [b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\n', answers.DONE]]
)
def test_a_stream_that_begins_with_a_usage_of_nothing_is_estimated(
    pair: House, upstream: Upstream, end: list[bytes]
) -> None:
    nothing = {"prompt_tokens": 7, "completion_tokens": 0}
    pieces = [answers.event({"choices": [{"delta": {"role": "assistant"}}], "usage": nothing})]
    pieces += [answers.event({"choices": [{"delta": {"content": word}}]}) for word in answers.words(100)]
    upstream.behave(answers.events([*pieces, *end]))
    pair.ask(None, stream=True)
    record = pair.records()[0]
    assert (record["tokens_source"], record["completion_tokens"]) == (
        "estimated",
        pytest.approx(100, rel=0.6),
    )


def test_a_whole_answer_without_usage_is_estimated_by_its_text(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(texts=[ENGLISH], usage=False))
    pair.ask(None)
    record = pair.records()[0]
    assert record["tokens_source"] == "estimated"
    assert record["completion_tokens"] == pytest.approx(COUNTED["english"][1], rel=0.15)


def test_the_prompt_of_a_caller_who_left_is_estimated_by_its_words(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.ok(chunks=200, delay=0.05))
    asked = {**prompt(CHINESE), "metadata": {"note": "x" * 10_000}, "stream": True}
    headers = {"Authorization": f"Bearer {pair.key}"}
    with httpx.stream(
        "POST", f"{pair.url}/v1/chat/completions", json=asked, headers=headers, timeout=10
    ) as answer:
        next(answer.iter_lines())
    record = pair.records()[0]
    assert record["status"] == "client_disconnected"
    assert record["prompt_tokens"] == estimates.of_request(prompt(CHINESE)) < 100


def test_what_the_provider_told_is_never_estimated(
    pair: House, upstream: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(body: Any) -> int:
        raise AssertionError("estimated")

    monkeypatch.setattr(estimates, "of_request", fail)
    pair.ask(None, stream=True)
    pair.ask(None)
    assert {record["tokens_source"] for record in pair.records(2)} == {"provider"}
