"""The sixteen faults of an upstream that a gateway survives, each with a fallback configured.

Each test looks at what the caller was told, at what both upstreams saw, and at what was recorded; the three have to agree.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from proxy.breaker import Breakers
from tests.support import answers, faults, prefill
from tests.support.answers import Answer
from tests.support.inprocess import House
from tests.support.reconcile import reconcile
from tests.support.told import Told, listen
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

LONG = prefill.LONG.text
SHORT = Answer().text
MOST_BACKOFF = 0.5
SLACK = 1.5
"""Seconds that a machine with other things to do may add."""
"""What a busy machine may add to a deadline."""

Ask = Callable[..., Told]


@pytest.fixture
def upstreams(pair: House, upstream: Upstream, fallback: Upstream) -> dict[str, Upstream]:
    return {"first": upstream, "second": fallback}


@pytest.fixture
def ask(pair: House, upstreams: dict[str, Upstream]) -> Iterator[Ask]:
    """Ask the active provider (or `model`) for a stream; when the test ends, the three ledgers are reconciled."""
    names = (f"request-{number}" for number in itertools.count())
    tolds: list[Told] = []

    def one(**more: Any) -> Told:
        told = listen(pair.url, pair.key, next(names), **more)
        tolds.append(told)
        told.check()
        return told

    yield one
    attempts = sum(max(told.attempts, told.status == 200) for told in tolds)
    reconcile(tolds, pair.records(attempts), upstreams)


def gaps(upstream: Upstream) -> list[float]:
    """Seconds between one request and the next, as this upstream saw them come."""
    times = [record.at for record in upstream.ledger.asked]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def alone() -> dict[str, str]:
    """A question that only the first provider may answer."""
    return {"model": "first/tiny"}


def test_fault_01_a_429_with_retry_after_is_obeyed_while_the_fallback_serves(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.script(answers.status(429, retry_after=2))

    served = [ask()]
    while len(upstream.ledger.asked) < 2:
        served.append(ask())
        assert len(served) < 2000

    assert all(told.text == SHORT for told in served)
    assert {told.provider for told in served[:-1]} == {"second"}
    assert served[-1].provider == "first"
    assert served[0].took < 1.5
    assert 2.0 <= gaps(upstream)[0] < 2.0 * 1.2 + SLACK


def test_fault_01_and_without_another_candidate_the_same_is_asked_again_after_it(
    ask: Ask, upstream: Upstream
) -> None:
    upstream.script(answers.status(429, retry_after=2))

    told = ask(**alone())

    assert told.text == SHORT
    assert 2.0 <= gaps(upstream)[0] < 2.0 * 1.2 + SLACK


def test_fault_02_a_429_without_end_costs_three_dials_at_most(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(answers.status(429))

    assert ask().provider == "second"
    assert len(upstream.ledger.asked) == 1

    fallback.behave(answers.status(429))
    before = len(upstream.ledger.asked) + len(fallback.ledger.asked)
    told = ask()

    assert (told.status, told.code) == (429, "rate_limit_exceeded")
    assert int(told.headers["retry-after"]) >= 1
    assert len(upstream.ledger.asked) + len(fallback.ledger.asked) - before <= 3
    assert told.took < 10


def test_fault_03_a_single_500_is_not_seen_by_the_caller(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.script(answers.status(500))
    told = ask()
    assert (told.text, told.provider) == (SHORT, "second")
    assert told.took < MOST_BACKOFF  # another candidate is there, so nobody waits

    upstream.script(answers.status(500))
    told = ask(**alone())
    assert (told.text, told.provider) == (SHORT, "first")
    assert told.took < MOST_BACKOFF + SLACK


def test_fault_04_a_503_without_end_fails_over_and_is_soon_left_alone(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(answers.status(503))

    served = [ask() for _ in range(30)]

    assert all(told.text == SHORT and told.provider == "second" for told in served)
    assert len(upstream.ledger.asked) == 5


def test_fault_05_a_reset_before_the_headers_is_not_seen_by_the_caller(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.script(faults.reset_before_headers())
    told = ask()
    assert (told.text, told.provider) == (SHORT, "second")

    upstream.script(faults.reset_before_headers())
    told = ask(**alone())
    assert (told.text, told.provider) == (SHORT, "first")
    assert told.took < MOST_BACKOFF + SLACK


def test_fault_06_a_silent_provider_is_given_up_in_time_and_not_asked_again(
    pair: House, ask: Ask, upstream: Upstream
) -> None:
    pair.shorten(first_token=0.6)
    upstream.behave(faults.silence())

    told = ask()
    assert (told.text, told.provider) == (SHORT, "second")
    assert 0.6 <= told.took < 0.6 + SLACK
    assert len(upstream.ledger.asked) == 1

    told = ask(**alone())
    assert (told.status, told.code) == (504, "upstream_timeout")
    assert 0.6 <= told.took < 0.6 + SLACK
    assert len(upstream.ledger.asked) == 2


def test_fault_07_a_stream_that_never_begins_is_taken_over(pair: House, ask: Ask, upstream: Upstream) -> None:
    pair.shorten(first_token=0.6)
    upstream.behave(faults.late_first_token(20))

    told = ask()

    assert (told.text, told.provider) == (SHORT, "second")
    assert 0.6 <= told.took < 0.6 + SLACK
    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)


# -- after the answer has begun -----------------------------------------------------------------------------------------


def second_is(house: House, kind: str) -> None:
    """Make the fallback a provider of this kind."""

    from providers import adapters

    number = house.watcher.snapshot.by_slug["second"]
    upstreams = dict(house.watcher.snapshot.upstreams)
    there = upstreams[number]
    upstreams[number] = replace(there, kind=adapters.kind(kind), endpoint=replace(there.endpoint, kind=kind))
    house._change(upstreams=upstreams)


FRAME_TOKENS = 5


def assert_resumed(told: Told, upstream: Upstream, fallback: Upstream) -> None:
    """The caller has all of it, in one piece, and the truth about who said what."""
    told.check(whole_text=LONG)
    assert told.ended_well
    assert told.models == ["tiny", "big"]
    assert told.finish_reasons == ["stop"]
    assert told.usage is not None
    own_prompt = answers.Answer().tokens(upstream.ledger.asked[0])["prompt_tokens"]
    # The one who went on counts the frame of the message it went on with, which nobody can tell apart from the prompt.
    assert own_prompt <= told.usage["prompt_tokens"] <= own_prompt + FRAME_TOKENS
    assert told.usage["completion_tokens"] == 60
    assert len(upstream.ledger.asked) == len(fallback.ledger.asked) == 1


BREAKS = [
    faults.reset_after(40),
    faults.unterminated_after(40),
    faults.closed_after(40),
    faults.ended_after(40),
]
BREAK_NAMES = ["reset", "unterminated", "closed", "ended"]
USAGE = {"stream_options": {"include_usage": True}}


@pytest.mark.parametrize("kind", ["vllm", "llamacpp", "deepseek"])
def test_fault_08_a_stream_cut_in_the_middle_is_gone_on_with_by_prefill(
    pair: House, ask: Ask, upstream: Upstream, fallback: Upstream, kind: str
) -> None:
    second_is(pair, kind)
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.continuing())

    told = ask(max_tokens=100, **USAGE)

    assert_resumed(told, upstream, fallback)
    sent = fallback.ledger.last.json
    assert prefill.asks_as(kind, sent), sent
    assert sent["messages"][:-1] == upstream.ledger.last.json["messages"]
    assert sent["messages"][-1]["content"] == "".join(answers.words(40)).rstrip()
    assert sent["max_tokens"] == 60
    first, second = pair.records(2)
    assert (first["status"], first["completion_tokens"]) == ("upstream_interrupted", 40)
    assert (second["status"], second["completion_tokens"]) == ("success", 20)


@pytest.mark.parametrize("fault", BREAKS, ids=BREAK_NAMES)
def test_fault_08_at_temperature_0_the_answer_is_begun_again_and_matched(
    pair: House, ask: Ask, upstream: Upstream, fallback: Upstream, fault: Any
) -> None:
    upstream.behave(fault)
    fallback.behave(prefill.continuing())

    told = ask(temperature=0, **USAGE)

    assert_resumed(told, upstream, fallback)
    assert fallback.ledger.last.json["messages"] == upstream.ledger.last.json["messages"]
    first, second = pair.records(2)
    assert (first["status"], second["status"]) == ("upstream_interrupted", "success")
    assert (first["completion_tokens"], second["completion_tokens"]) == (40, 60)


def test_fault_08_another_answer_at_temperature_0_is_not_mixed_with_the_first(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(faults.reset_after(40))
    fallback.behave(answers.ok(texts=(*answers.words(20), *(f"other{n} " for n in range(40)))))

    told = ask(temperature=0)

    told.check(whole_text=LONG)
    assert told.code == "upstream_interrupted"
    assert told.text == "".join(answers.words(40))


@pytest.mark.parametrize("fault", BREAKS, ids=BREAK_NAMES)
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 0, "headers": {"x-penstock-resume": "off"}},
        {"temperature": 0, "logprobs": True},
        {"temperature": 0, "response_format": {"type": "json_object"}},
    ],
    ids=["by default warm", "warm", "not wanted", "logprobs", "a format"],
)
def test_fault_08_where_nothing_can_be_resumed_there_is_one_honest_error(
    ask: Ask, upstream: Upstream, fallback: Upstream, fault: Any, more: dict[str, Any]
) -> None:
    upstream.behave(fault)

    told = ask(**more)

    told.check(whole_text=LONG)
    assert told.code == "upstream_interrupted" and told.closed
    assert told.text == "".join(answers.words(40))
    assert not fallback.ledger.asked


@pytest.mark.parametrize("more", [{"temperature": 0}, {}], ids=["resumed", "an error"])
def test_fault_09_a_stream_that_goes_silent_is_noticed_within_the_idle_limit(
    pair: House, ask: Ask, upstream: Upstream, fallback: Upstream, more: dict[str, Any]
) -> None:
    pair.shorten(idle=0.6)
    upstream.behave(faults.stall_after(40))
    fallback.behave(prefill.continuing())

    told = ask(**more, **USAGE)

    assert 0.6 <= told.took < 0.6 + SLACK + 0.2
    upstream.ledger.wait_for(lambda ledger: ledger.last.closed_by_peer_at)
    assert pair.records(len(more) + 1)[0]["status"] == "upstream_stalled"
    if more:
        assert_resumed(told, upstream, fallback)
    else:
        told.check(whole_text=LONG)
        assert told.code == "upstream_stalled" and told.closed


def test_fault_10_an_event_that_is_no_json_is_skipped_or_ends_the_stream_cleanly(
    ask: Ask, upstream: Upstream
) -> None:
    upstream.script(faults.garbage_event(3), faults.binary_event(3))

    for _ in range(2):
        ask().check(whole_text="".join(answers.words(8)))

    assert ask().text == SHORT


@pytest.mark.parametrize(
    "fault",
    [faults.bad_utf8(3), faults.garbage_event(3, b'data: {"choices": [oops}\n\n')],
    ids=["no UTF-8", "in braces"],
)
def test_fault_10_nor_does_garbage_that_looks_like_an_event_reach_the_caller(
    ask: Ask, upstream: Upstream, fault: Any
) -> None:
    upstream.script(fault)

    told = ask()

    told.check(whole_text="".join(answers.words(8)))
    assert b"oops" not in told.body
    assert ask().text == SHORT


def test_fault_11_a_whole_stream_without_done_is_finished_at_once(ask: Ask, upstream: Upstream) -> None:
    upstream.behave(faults.no_done())

    told = ask()

    told.check(whole_text=SHORT)
    assert told.ended_well and told.took < SLACK + 0.2
    assert len(upstream.ledger.asked) == 1


def test_fault_12_a_prompt_that_is_too_long_goes_to_a_larger_window_and_is_not_repeated(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(answers.context_too_long())

    told = ask()
    assert (told.text, told.provider) == (SHORT, "second")
    assert len(upstream.ledger.asked) == 1

    fallback.behave(answers.context_too_long())
    told = ask()
    assert (told.status, told.code) == (400, "context_length_exceeded")
    assert (len(upstream.ledger.asked), len(fallback.ledger.asked)) == (2, 2)


def test_fault_13_a_refusal_by_content_policy_is_passed_on_with_its_reason(
    ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    upstream.behave(answers.content_policy())

    told = ask()

    assert (told.status, told.code) == (400, "content_policy_violation")
    assert "rejected by the safety system" in told.errors[0]["message"]
    assert len(upstream.ledger.asked) == 1 and not fallback.ledger.asked


def test_fault_14_a_refused_prefill_becomes_a_clean_restart_or_one_error(
    pair: House, ask: Ask, upstream: Upstream, fallback: Upstream
) -> None:
    second_is(pair, "vllm")
    upstream.behave(faults.reset_after(40))
    fallback.behave(prefill.refusing())

    told = ask(temperature=0, **USAGE)
    told.check(whole_text=LONG)
    assert told.ended_well and told.models == ["tiny", "big"]
    assert [prefill.prefill_of(each.json) is None for each in fallback.ledger.asked] == [False, True]
    restarted = fallback.ledger.last.json
    assert "continue_final_message" not in restarted and "add_generation_prompt" not in restarted

    warm = ask(temperature=0.7)
    warm.check(whole_text=LONG)
    assert warm.code == "upstream_interrupted"
    assert b"PREFILL" not in told.body + warm.body


def test_fault_15_a_provider_that_is_down_for_a_minute_is_found_again_within_thirty_seconds(
    pair: House, ask: Ask, upstream: Upstream
) -> None:
    """The breaker's clock is handed in: five requests at first, then one each second of it."""
    clock = [1000.0]
    pair.gateway.breakers = Breakers(lambda: clock[0])
    upstream.refuse()
    assert all(ask(stream=False).attempts == 2 for _ in range(5))
    assert pair.watcher._suspects == {1}  # so that it is probed at once

    tried = []
    for second in range(1, 91):
        clock[0] += 1
        if second == 60:
            upstream.listen()
        told = ask(stream=False)
        assert told.text == SHORT
        if told.provider == "first":
            break
        if told.attempts > 1:
            tried.append(second)

    assert told.provider == "first" and 60 <= second <= 90, "the recovery is not found"
    assert len(tried) <= 2 and all(each >= 29 for each in tried), tried


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "plain"])
@pytest.mark.parametrize("fault", [answers.status(500), faults.silence()], ids=["500", "silence"])
def test_fault_16_after_a_failover_model_and_usage_are_those_of_who_answered(
    pair: House, ask: Ask, upstream: Upstream, fallback: Upstream, fault: Any, stream: bool
) -> None:
    pair.shorten(first_token=0.4, request=0.4)
    upstream.behave(fault)
    fallback.behave(answers.ok(chunks=9))

    told = ask(stream=stream, **(USAGE if stream else {}))

    assert told.headers["x-penstock-model"] == "big"
    assert told.headers["x-penstock-attempts"] == "2"
    assert told.usage is not None and told.usage["completion_tokens"] == 9
    assert b'"model":"tiny"' not in told.body.replace(b" ", b"")
    first, second = pair.records(2)
    assert (first["model"], first["completion_tokens"], first["prompt_tokens"]) == ("tiny", 0, 0)
    assert (second["model"], second["completion_tokens"]) == ("big", 9)
    assert second["prompt_tokens"] == told.usage["prompt_tokens"]
