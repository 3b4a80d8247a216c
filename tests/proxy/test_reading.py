"""An upstream's stream, cut in any way, is understood in one way."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers.adapters import KINDS
from proxy.reading import AnswerReader

pytestmark = pytest.mark.no_database

CHAT = KINDS["openai"].chat
assert CHAT is not None


def event(delta: dict[str, Any] | None, *, finish: str | None = None, index: int = 0, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": index, "delta": delta, "finish_reason": finish}]
    return (
        b"data: "
        + json.dumps({"id": "c1", "choices": choices, **more}, ensure_ascii=False).encode()
        + b"\n\n"
    )


ROLE = event({"role": "assistant", "content": ""})
WORDS = [event({"content": f"wörd {n}\u2028 "}) for n in range(6)]
FINISH = event({}, finish="stop")
USAGE = event(None, usage={"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9})
DONE = b"data: [DONE]\n\n"
WHOLE = b"".join([ROLE, *WORDS, b": keep-alive\n\n", FINISH, USAGE, DONE])
EXPECTED = b"".join([ROLE, *WORDS, b": keep-alive\n\n", FINISH])


def reader(*, choices: int = 1, wants_usage: bool = False) -> AnswerReader:
    assert CHAT is not None
    return AnswerReader(CHAT, choices=choices, wants_usage=wants_usage)


@pytest.mark.parametrize("text", ["x" * 900_000, "\\n" * 450_000], ids=["plain", "escaped"])
def test_r30_a_large_event_takes_little_more_memory_than_it_has(text: str) -> None:
    one = reader()
    events = [event({"content": each}).replace(b"TEXT", text.encode()) for each in ("first", "TEXT", "TEXT")]
    tracemalloc.start()
    try:
        # With other ids, so that each is read; then alike, so that it is not.
        out = feed(one, [events[0], events[1].replace(b"c1", b"c2"), events[2].replace(b"c1", b"c2")])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(out) > 2 * len(text)
    assert peak < 24 * 1024 * 1024


def feed(one: AnswerReader, parts: list[bytes]) -> bytes:
    return b"".join(one.feed(part) for part in parts)


@given(st.sets(st.integers(1, len(WHOLE) - 1), max_size=30))
def test_any_cutting_gives_the_same_bytes_the_same_usage_and_the_same_end(cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), len(WHOLE)]
    one = reader()
    out = feed(one, [WHOLE[a:b] for a, b in itertools.pairwise(bounds)])
    assert one.complete and one.done and one.failure is None
    assert out + one.last_bytes() == EXPECTED + DONE
    assert one.usage is not None and (one.usage.prompt, one.usage.completion) == (3, 6)
    assert one.finish_reason == "stop"


@given(st.integers(0, len(WHOLE) - 1))
def test_a_stream_that_ends_early_is_never_complete_unless_it_said_so(end: int) -> None:
    one = reader()
    out = one.feed(WHOLE[:end])
    out += one.ended()
    if (
        FINISH in WHOLE[:end] + b"\n\n"
        or WHOLE[:end].endswith(FINISH.rstrip())
        or FINISH.rstrip() in WHOLE[:end]
    ):
        assert one.complete
    else:
        assert one.failure is not None and not one.complete
        assert EXPECTED.startswith(out.rstrip(b"\n")) or b"data: " in out


def running(completion: int) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 3, "completion_tokens": completion}}


BEGINNING = event({"role": "assistant", "content": ""}, **running(0))
SO_FAR = event(None, **running(2))


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        ([BEGINNING, *WORDS, FINISH, DONE], None),
        ([BEGINNING, *WORDS], None),
        ([ROLE, *WORDS[:2], SO_FAR, *WORDS[2:], FINISH, DONE], None),
        ([ROLE, *WORDS[:2], SO_FAR, event({"tool_calls": [{"index": 0}]}), FINISH], None),
        ([BEGINNING, event({"content": "a"}, finish="stop"), DONE], None),
        ([ROLE, *WORDS[:2], SO_FAR, ROLE, FINISH, DONE], 2),
        ([BEGINNING, *WORDS, FINISH, USAGE, DONE], 6),
        ([BEGINNING, *(event({"content": "a"}, **running(n)) for n in (1, 2, 3))], 3),
        ([BEGINNING, *(event({"content": "a"}, **running(n)) for n in (1, 2, 3)), FINISH, DONE], 3),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_only_a_usage_that_no_more_of_the_answer_follows_is_its_usage(
    parts: list[bytes], told: int | None, together: bool
) -> None:
    one = reader()
    feed(one, [b"".join(parts)] if together else parts)
    assert one.failure is None
    assert (None if one.usage is None else one.usage.completion) == told


def test_nothing_is_released_before_there_is_content() -> None:
    one = reader()
    assert one.feed(b": hello\n\n" + ROLE) == b""
    assert not one.begun
    assert one.feed(WORDS[0]) == ROLE + WORDS[0]
    assert one.begun


def test_the_end_is_held_until_it_is_asked_for() -> None:
    one = reader(wants_usage=True)
    assert one.feed(ROLE + WORDS[0] + WORDS[1]) == ROLE + WORDS[0] + WORDS[1]
    assert one.feed(WORDS[2] + FINISH) == WORDS[2]
    assert one.complete and not one.done
    assert one.feed(USAGE + DONE) == b""
    assert one.last_bytes() == FINISH + USAGE + DONE


def test_every_choice_has_to_finish() -> None:
    one = reader(choices=2)
    assert one.feed(WORDS[0] + FINISH) == WORDS[0] + FINISH
    assert not one.complete
    assert one.feed(event({"content": "b"}, index=1)) != b""
    one.feed(event({}, finish="stop", index=1))
    assert one.complete


def test_choices_may_finish_in_one_event() -> None:
    one = reader(choices=2)
    one.feed(WORDS[0])
    both: list[dict[str, Any]] = [{"index": index, "delta": {}, "finish_reason": "stop"} for index in (0, 1)]
    one.feed(b"data: " + json.dumps({"id": "c1", "choices": both}).encode() + b"\n\n")
    assert one.complete


@pytest.mark.parametrize(
    "broken", [b"data: {oops\n\n", b"data: \xff\xfe\n\n", b"data: [1]\n\n", b"garbage: x\ndata: nope\n\n"]
)
def test_what_came_before_garbage_is_released_and_the_garbage_is_not(broken: bytes) -> None:
    one = reader()
    out = one.feed(ROLE + WORDS[0] + WORDS[1] + broken + WORDS[2])
    assert out == ROLE + WORDS[0] + WORDS[1]
    assert one.failure is not None


def test_words_about_errors_and_usage_are_only_words() -> None:
    tricky = event(
        {"content": '{"error": {"code": 1}, "usage": {"prompt_tokens": 1}, "finish_reason": "stop"} [DONE]'}
    )
    one = reader()
    assert one.feed(ROLE + tricky + WORDS[0]) == ROLE + tricky + WORDS[0]
    assert one.failure is None and not one.complete and one.usage is None


def test_an_error_after_the_finish_reason_changes_nothing() -> None:
    one = reader()
    one.feed(ROLE + WORDS[0] + FINISH + b'data: {"error": {"message": "late"}}\n\n')
    assert one.complete and one.failure is None
    assert one.last_bytes() == FINISH + DONE


BROKEN = [
    b'data: {"id": "c1", "choices": [oops}\n\n',
    b'data: {"id": "c1", "choices": [{"index": 0, "delta": {"content": "\x80\xe2"}, "finish_reason": null}]}\n\n',
    b'data: {"id": "c1", "choices": [{"index": 0, "delta": {"content": "a\x01"}, "finish_reason": null}]}\n\n',
    b'data: {"id": "c1", "choices": [{"index": 0, "delta": {"content": "a\\q"}, "finish_reason": null}]}\n\n',
    b"data: null\n\n",
]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("together", [True, False])
def test_what_is_no_json_is_a_failure_and_nothing_of_it_is_passed_on(broken: bytes, together: bool) -> None:
    one = reader()
    parts = [ROLE, *WORDS[:2], broken, *WORDS[2:], FINISH, DONE]
    out = b""
    for part in [b"".join(parts)] if together else parts:
        if one.failure is None:
            out += one.feed(part)
    assert out == b"".join([ROLE, *WORDS[:2]])
    assert one.failure is not None and not one.complete


@given(
    st.lists(
        st.sampled_from(["a", '"', "\\", "\n", "w\u00f6rt", "\u2028", "{", "}", ',"finish_reason":"stop"'])
    )
)
def test_every_text_passes_unchanged_and_is_counted(texts: list[str]) -> None:
    one = reader()
    stream = b"".join([ROLE, event({"content": "x"}), *(event({"content": text}) for text in texts)])
    assert one.feed(stream) == stream
    assert one.events == 1 + len(texts) and not one.complete and one.failure is None


def test_events_that_differ_in_their_text_alone_are_not_read() -> None:
    """Else each would cost a parser's time, and nobody would notice."""
    assert CHAT is not None
    read = []

    def read_event(data: bytes) -> Any:
        read.append(data)
        return CHAT.read_event(data)

    one = AnswerReader(replace(CHAT, read_event=read_event), choices=1, wants_usage=False)
    feed(one, [ROLE, *WORDS, FINISH])
    assert len(read) == 3
    assert one.events == len(WORDS) + 1
