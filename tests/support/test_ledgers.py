"""The readers of ledgers find what they are there to find."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.support import prefill
from tests.support.reconcile import reconcile
from tests.support.told import CHAT, DONE, Told, question
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HEADERS = {"content-type": "text/event-stream", "x-request-id": "r", "x-penstock-attempts": "1"}
ERROR = {"error": {"code": "upstream_interrupted"}, "request_id": "r"}


def chunk(finish: str | None = None, id: str = "a", **delta: Any) -> dict[str, Any]:
    return {"id": id, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def told(*events: Any, name: str = "r", **fields: Any) -> Told:
    body = b"".join(
        b"data: " + (DONE if each == DONE else json.dumps(each)).encode() + b"\n\n" for each in events
    )
    return Told(name, 200, HEADERS, body, **fields)


ROLE, ONE, TWO = chunk(role="assistant"), chunk(content="one "), chunk(content="two ")
WELL = (ROLE, ONE, TWO, chunk("stop"), DONE)


def test_a_good_stream_and_an_honest_error_pass() -> None:
    told(*WELL).check(whole_text="one two ")
    told(ROLE, ONE, ERROR, closed=True).check(whole_text="one two ")


@pytest.mark.parametrize(
    "events",
    [
        (ROLE, ROLE, ONE, TWO, chunk("stop"), DONE),
        (ROLE, ONE, ONE, TWO, chunk("stop"), DONE),
        (ROLE, ONE, chunk("stop"), DONE),
        (ROLE, ONE, TWO, chunk("stop"), chunk("stop"), DONE),
        (ROLE, ONE, TWO, DONE),
        (ROLE, ONE, TWO),
        (ROLE, ONE, ERROR, DONE),
        (ROLE, ONE, ERROR, ERROR),
        (ROLE, ONE, chunk("stop"), ERROR),
        (ROLE, ONE, chunk(id="b", content="two "), chunk("stop"), DONE),
        (ROLE, TWO, chunk("stop"), DONE),
    ],
    ids=[
        "two roles", "twice", "truncated", "two finishes", "no finish", "no end", "an error and done", "two errors",
        "a made-up finish", "two ids", "not the beginning",
    ],
)  # fmt: skip
def test_a_stream_that_breaks_a_promise_is_found(events: tuple[Any, ...]) -> None:
    with pytest.raises(AssertionError):
        told(*events).check(whole_text="one two ")


@pytest.mark.parametrize("fields", [{"whole": False}, {"closed": False}])
def test_a_body_without_its_end_and_a_connection_that_stays_open_are_found(fields: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        told(ROLE, ONE, ERROR, **fields).check()


def record(**fields: Any) -> dict[str, Any]:
    return {
        "request_id": "r",
        "attempt": 1,
        "provider": "first",
        "status": "success",
        "completion_tokens": 5,
        "tokens_source": "provider",
        "ttft_ms": 3,
        "stream": True,
        **fields,
    }


FAILED = record(status="error", completion_tokens=0, ttft_ms=None)


@pytest.mark.parametrize(
    "records",
    [
        [],
        [record(), record(attempt=2)],
        [record(attempt=2)],
        [record(status="error")],
        [record(completion_tokens=6)],
        [record(), record(request_id="nobody")],
        [record(provider="second")],
        [{**FAILED, "completion_tokens": 4}, record(attempt=2)],
    ],
    ids=[
        "none",
        "two answers",
        "not numbered",
        "an error",
        "tokens",
        "nobody's",
        "somebody else's",
        "billed",
    ],
)
def test_ledgers_that_do_not_agree_are_found(records: list[dict[str, Any]]) -> None:
    with Upstream() as upstream:
        httpx.post(f"{upstream.url}{CHAT}", json=question("r", stream=True))
        reconcile([told(*WELL)], [record()], {"first": upstream})
        with pytest.raises(AssertionError):
            reconcile([told(*WELL)], records, {"first": upstream})


@pytest.mark.parametrize("number", [0, 1, 40, 59, 60])
def test_a_model_goes_on_where_the_prefill_ends(number: int) -> None:
    whole = prefill.LONG.text
    begun = "".join(prefill.LONG.texts[:number]).rstrip()
    messages = [{"role": "user", "content": "r"}, {"role": "assistant", "content": begun}]
    with Upstream(prefill.continuing()) as upstream:
        answer = httpx.post(f"{upstream.url}{CHAT}", json={"messages": messages}).json()
        refused = httpx.post(
            f"{upstream.url}{CHAT}", json={"messages": [*messages[:1], {**messages[1], "content": "other"}]}
        )
        upstream.behave(prefill.refusing())
        assert httpx.post(f"{upstream.url}{CHAT}", json={"messages": messages}).status_code == 400
        again = httpx.post(f"{upstream.url}{CHAT}", json={"messages": messages[:1]}).json()
    assert begun + answer["choices"][0]["message"]["content"] == (whole if number < 60 else begun)
    assert answer["usage"]["completion_tokens"] == 60 - number
    assert refused.status_code == 400
    assert again["choices"][0]["message"]["content"] == whole
