"""A broken stream is gone on with as if it had never broken, or not at all."""

from __future__ import annotations

import json
from typing import Any

import pytest

from providers import sse
from providers.adapters import KINDS
from providers.errors import AnotherAnswer, Interrupted, UpstreamRefused
from providers.wire import Chat
from proxy.resume import MAX_TEXT_BYTES, Resumption, Seam, Way, may_resume

pytestmark = pytest.mark.no_database

QUESTION = {"role": "user", "content": "hello"}


def chat_of(kind: str) -> Chat:
    chat = KINDS[kind].chat
    assert chat is not None
    return chat


VLLM, OTHER = chat_of("vllm"), chat_of("openai-compatible")


def event(delta: dict[str, Any], *, id: str = "first", finish: str | None = None, **more: Any) -> bytes:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    data = {"id": id, "created": 7, "model": f"model of {id}", "choices": choices, **more}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def broken_after(*texts: str, **body: Any) -> Resumption:
    """A stream of which the caller has these texts."""
    resumption = Resumption({"messages": [QUESTION], **body})
    resumption.add(event({"role": "assistant", "content": ""}))
    for text in texts:
        resumption.add(event({"content": text}))
    assert not resumption.broken("one/tiny", Interrupted())
    return resumption


def go_on(resumption: Resumption, chat: Chat, way: Way, *events: bytes) -> tuple[str, Any]:
    """The text that the caller gets from these events of the next provider, and its reader."""
    reader = resumption.reader(chat, way, wants_usage=True)
    out = b""
    for each in events:
        if not (reader.complete or reader.failure or reader.done):
            out += reader.feed(each)
    if reader.complete and reader.failure is None:
        out += reader.last_bytes()
    chunks = [json.loads(one.data) for one in sse.events(out) if one.data != b"[DONE]"]
    assert all(chunk["id"] == "first" for chunk in chunks)
    assert not any("role" in choice["delta"] for chunk in chunks for choice in chunk["choices"])
    return "".join(c["delta"].get("content", "") for chunk in chunks for c in chunk["choices"]), reader


def second(*texts: str, finish: str = "stop") -> list[bytes]:
    return [
        event({"role": "assistant", "content": ""}, id="second"),
        *(event({"content": text}, id="second") for text in texts),
        event({}, id="second", finish=finish),
    ]


@pytest.mark.parametrize(
    ("had", "comes", "whole"),
    [
        ("The sky ", [" is", " blue"], "The sky is blue"),
        ("The sky", [" is", " blue"], "The sky is blue"),
        ("The sky \n\n", ["\n\nis"], "The sky \n\n\n\nis"),
        ("The sky \n\n", [" ", "\n\nis"], "The sky \n\nis"),
        ("wört\u2028", ["\u2028", "é"], "wört\u2028é"),
    ],
)
def test_what_was_delivered_is_not_said_twice_and_no_blank_is_lost(
    had: str, comes: list[str], whole: str
) -> None:
    resumption = broken_after(had)
    text, reader = go_on(resumption, VLLM, "prefill", *second(*comes))
    assert had + text == whole
    assert reader.complete and reader.finish_reason == "stop"


def test_the_prefill_is_the_text_without_the_blanks_at_its_end_and_fewer_tokens_may_come() -> None:
    resumption = broken_after("The ", "sky ", max_tokens=10)
    body = resumption.body(VLLM, "prefill")
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "The sky"}]
    assert body["max_tokens"] == 8


def test_a_stop_string_across_the_seam_ends_the_answer() -> None:
    resumption = broken_after("one EN", stop=["END"])
    text, reader = go_on(resumption, VLLM, "prefill", *second("D two", " three"))
    assert text == ""
    assert reader.complete and reader.finish_reason == "stop"


def test_what_only_begins_like_a_stop_string_does_not() -> None:
    seam = Seam("one EN", ["END", "x"])
    assert seam.cross("T") + seam.cross("ER END") == "TER END"
    assert not seam.stopped


def test_a_stop_string_that_takes_several_events_after_the_seam_is_not_shown_in_part() -> None:
    resumption = broken_after("one <|e", stop=["<|end|>"])
    text, reader = go_on(resumption, VLLM, "prefill", *second("n", "d", "|>", " three"))
    assert text == ""
    assert reader.complete and reader.finish_reason == "stop"


@pytest.mark.parametrize("stops", [["x"] * 17, ["x" * 257]], ids=["many", "long"])
def test_where_the_stop_strings_are_too_much_to_watch_nobody_goes_on_within_the_text(
    stops: list[str],
) -> None:
    assert broken_after("one", stop=stops).ways(VLLM, "other") == []
    assert broken_after("one", stop=stops, temperature=0).ways(VLLM, "other") == ["restart"]
    assert broken_after("one", stop=["x" * 256] * 16).ways(VLLM, "other") == ["prefill"]


def test_what_was_held_for_a_stop_string_that_never_came_is_told_at_the_end() -> None:
    resumption = broken_after("one <|e", stop=["<|end|>"])
    text, reader = go_on(resumption, VLLM, "prefill", *second("n", "d"))
    assert text == "nd"
    assert reader.complete


def test_a_new_answer_is_passed_on_from_where_the_first_one_broke() -> None:
    resumption = broken_after("The sky", temperature=0)
    text, reader = go_on(resumption, OTHER, "restart", *second("The", " sky is", " blue"))
    assert text == " is blue" and reader.complete


@pytest.mark.parametrize("comes", [["The sun"], ["The"], ["the sky is blue"]])
def test_another_answer_is_a_failure_and_nothing_of_it_is_passed_on(comes: list[str]) -> None:
    resumption = broken_after("The sky", temperature=0)
    text, reader = go_on(resumption, OTHER, "restart", *second(*comes))
    assert text == "" and isinstance(reader.failure, Interrupted)


def test_the_usage_is_that_of_one_answer() -> None:
    resumption = broken_after("one ", "two ")
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    reader = resumption.reader(VLLM, "prefill", wants_usage=True)
    reader.feed(b"".join(second("three")))
    reader.feed(b"data: " + json.dumps({"id": "second", "choices": [], "usage": usage}).encode() + b"\n\n")
    told = [json.loads(one.data) for one in sse.events(reader.last_bytes()) if one.data != b"[DONE]"]
    assert told[-1]["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def test_a_stream_may_be_gone_on_with_twice() -> None:
    resumption = broken_after("one ")
    reader = resumption.reader(VLLM, "prefill", wants_usage=False)
    resumption.add(reader.feed(b"".join(second("two ")[:-1])))
    text, _ = go_on(resumption, VLLM, "prefill", *second("three"))
    assert resumption.text + text == "one two three"


@pytest.mark.parametrize(
    "delta",
    [
        {"tool_calls": [{"index": 0, "id": "c", "function": {"name": "f", "arguments": ""}}]},
        {"reasoning_content": "let me see"},
        {"refusal": "no"},
        {"content": "x" * (MAX_TEXT_BYTES + 1)},
    ],
)
def test_what_is_more_than_a_plain_text_is_not_gone_on_with(delta: dict[str, Any]) -> None:
    resumption = broken_after("text", temperature=0)
    resumption.add(event(delta))
    assert resumption.ways(VLLM, "two/big") == []


def test_nothing_is_gone_on_with_when_all_tokens_have_come() -> None:
    assert broken_after("one ", "two ", max_tokens=2).ways(VLLM, "two/big") == []


def test_who_refuses_the_prefill_is_asked_again_from_the_beginning_where_that_is_honest() -> None:
    warm, cold = broken_after("text"), broken_after("text", temperature=0)
    assert warm.ways(VLLM, "two/big") == ["prefill"] and warm.ways(OTHER, "two/big") == []
    assert cold.ways(VLLM, "two/big") == ["prefill", "restart"] and cold.ways(OTHER, "two/big") == ["restart"]
    for resumption in (warm, cold):
        resumption.body(VLLM, "prefill", "two/big")
        assert resumption.broken("two/big", UpstreamRefused())
        assert not resumption.broken("two/big", UpstreamRefused())
        assert isinstance(resumption.broke, Interrupted)
    assert warm.ways(VLLM, "two/big") == [] and cold.ways(VLLM, "two/big") == ["restart"]


@pytest.mark.parametrize(
    "body",
    [{"n": 2}, {"logprobs": True}, {"response_format": {"type": "json_object"}}, {"grammar": "root ::= x"}],
)
def test_a_request_for_more_than_one_plain_text_is_never_gone_on_with(body: dict[str, Any]) -> None:
    assert may_resume({"messages": [QUESTION]})
    assert not may_resume({"messages": [QUESTION], **body})


def test_a_failed_restart_says_nothing_not_even_that_it_is_finished() -> None:
    resumption = broken_after("The sky", temperature=0)
    both = event(
        {"content": "No"}, id="second", finish="stop", usage={"prompt_tokens": 1, "completion_tokens": 1}
    )
    reader = resumption.reader(OTHER, "restart", wants_usage=True)
    assert reader.feed(both) == b"" and reader.failure is not None


def test_a_tool_call_in_place_of_the_text_is_another_answer() -> None:
    call = [{"index": 0, "id": "c", "function": {"name": "f", "arguments": "{}"}}]
    reader = broken_after("The sky", temperature=0).reader(OTHER, "restart", wants_usage=False)
    assert reader.feed(event({"tool_calls": call}, id="second")) == b"" and reader.failure is not None


def test_another_answer_is_nobodys_fault_and_is_not_asked_for_again() -> None:
    error = AnotherAnswer()
    assert error.blame == "nobody"
    assert not error.again


def test_the_usage_counts_what_was_delivered_once_however_long_the_rest_is() -> None:
    resumption = broken_after("one ", "two ")
    reader = resumption.reader(VLLM, "prefill", wants_usage=True)
    for _ in range(2000):
        resumption.add(reader.feed(event({"content": "more "}, id="second")))
    usage = {"prompt_tokens": 12, "completion_tokens": 2000, "total_tokens": 2012}
    reader.feed(event({}, id="second", finish="length"))
    reader.feed(b"data: " + json.dumps({"id": "second", "choices": [], "usage": usage}).encode() + b"\n\n")
    told = [json.loads(one.data) for one in sse.events(reader.last_bytes()) if one.data != b"[DONE]"]
    assert told[-1]["usage"] == {"prompt_tokens": 10, "completion_tokens": 2002, "total_tokens": 2012}


def test_half_a_character_passes_and_is_nothing_to_go_on_from() -> None:
    resumption = broken_after("text", temperature=0)
    resumption.add(b'data: {"choices":[{"index":0,"delta":{"content":"\\ud83d"}}]}\n\n')
    assert resumption.ways(VLLM, "two/big") == []


def test_a_request_that_begins_the_answer_itself_is_not_prefilled_again() -> None:
    resumption = Resumption(
        {"messages": [QUESTION, {"role": "assistant", "content": "So:"}], "temperature": 0}
    )
    resumption.add(event({"content": " text"}))
    assert resumption.ways(VLLM, "two/big") == ["restart"]


def test_a_refused_restart_is_not_asked_for_again() -> None:
    resumption = broken_after("text", temperature=0)
    resumption.body(OTHER, "restart", "two/big")
    assert not resumption.broken("two/big", UpstreamRefused())
