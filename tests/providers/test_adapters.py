"""Every kind of provider against exchanges in its own words, and the shared dialect against nonsense."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import adapters, errors, sse
from providers.adapters import KINDS, SELF_HOSTED, VENDORS
from providers.adapters.failures import classify
from providers.adapters.openai import around_text, read_completion, read_event, read_models, read_usage
from providers.destination import check_url
from providers.wire import Answer, Chat, Endpoint, Event, Kind, origin_of

pytestmark = pytest.mark.no_database

WIRE = Path(__file__).parent.parent / "wire"
REMOTE = sorted(set(KINDS) - {"echo"})
JSON_VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(allow_nan=False, allow_infinity=False),
        st.text(max_size=8),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def endpoint(kind: str, base_url: str = "") -> Endpoint:
    return Endpoint(1, "u", "s", "n", kind, base_url or KINDS[kind].base_url)


def chat_of(kind: Kind) -> Chat:
    assert kind.chat is not None
    return kind.chat


def recorded(kind: str, name: str) -> Any:
    return json.loads((WIRE / kind / name).read_text())


def body_of(case: dict[str, Any]) -> bytes:
    body = case["body"]
    return body.encode() if isinstance(body, str) else json.dumps(body).encode()


def test_the_seventeen_kinds_are_there() -> None:
    assert set(KINDS) == {
        "openai", "openrouter", "together", "fireworks", "groq", "mistral", "deepseek", "zai", "huggingface", "anthropic", "google",
        "cohere", "vllm", "ollama", "llamacpp", "openai-compatible", "echo",
    }  # fmt: skip
    assert {"vllm", "ollama", "llamacpp", "openai-compatible"} == SELF_HOSTED
    assert set(KINDS) - SELF_HOSTED - {"echo"} == VENDORS
    assert all(name == kind.name and kind.label for name, kind in KINDS.items())
    assert all(KINDS[name].needs_key for name in VENDORS)


def test_an_unknown_kind_is_our_error() -> None:
    with pytest.raises(errors.UnknownKind):
        adapters.kind("nonsense")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_every_kinds_default_address_may_be_dialled(name: str) -> None:
    check_url(KINDS[name].base_url, allow_private=KINDS[name].self_hosted)


@pytest.mark.parametrize("name", REMOTE)
def test_the_recorded_stream_is_understood(name: str) -> None:
    expected = recorded(name, "expected.json")
    chat = chat_of(KINDS[name])
    chunks = [event for event in sse.events((WIRE / name / "stream.sse").read_bytes()) if event.data]
    read = [chat.read_event(event.data) for event in chunks]
    assert [event.error for event in read] == [None] * len(read)
    assert (
        next(index for index, event in enumerate(read) if event.commits) == expected["first_committing_chunk"]
    )
    assert [event.finish_reason for event in read if event.finish_reason] == [expected["finish_reason"]]
    assert [event.usage._asdict() for event in read if event.usage] == [expected["usage"]]
    for raw, event in zip(chunks, read, strict=True):
        if event.usage_only:
            assert json.loads(raw.data)["choices"] == []


@pytest.mark.parametrize("name", REMOTE)
def test_the_recorded_completion_is_understood(name: str) -> None:
    completion = chat_of(KINDS[name]).read_completion((WIRE / name / "completion.json").read_bytes())
    assert completion.usage is not None
    assert (completion.usage.prompt, completion.usage.completion) == (9, 3)
    assert completion.finish_reason


@pytest.mark.parametrize("name", REMOTE)
def test_the_recorded_list_of_models_is_understood(name: str) -> None:
    models = KINDS[name].models
    assert models is not None
    found = models.parse((WIRE / name / "models.json").read_bytes())
    told = [
        {"id": each.id, "purposes": list(each.purposes), "context_window": each.context_window}
        for each in found
    ]
    assert told == recorded(name, "expected.json")["models"]


@pytest.mark.parametrize("name", REMOTE)
def test_the_recorded_refusals_are_understood(name: str) -> None:
    for case in recorded(name, "errors.json"):
        error = KINDS[name].classify(case["status"], case["headers"], body_of(case))
        assert type(error).__name__ == case["expected"], case
        assert error.upstream_status == case["status"]
        assert error.retry_after == case.get("retry_after")
        assert error.param == case.get("param")


@pytest.mark.parametrize("name", sorted(SELF_HOSTED))
def test_the_recorded_probes_are_understood(name: str) -> None:
    probe = KINDS[name].probe
    assert probe is not None
    for case in recorded(name, "probes.json"):
        reading = probe.read(Answer(case["status"], {}, body_of(case)))
        assert (reading.status, reading.status_code) == (case["expected"], case["status"]), case
        assert case.get("detail", "") in reading.detail


@pytest.mark.parametrize("name", sorted(KINDS))
def test_no_probe_and_no_discovery_costs_a_completion_or_leaves_the_origin(name: str) -> None:
    kind, where = KINDS[name], endpoint(name)
    assert kind.probe is not None
    assert kind.models is not None
    for request in (kind.probe.request(where), kind.models.request(where)):
        assert request.method == "GET"
        assert request.body is None
        assert "completions" not in request.url
        assert origin_of(request.url) == where.origin


@pytest.mark.parametrize(
    ("name", "chat", "models", "probe"),
    [
        ("openai", "https://api.openai.com/v1/chat/completions", "https://api.openai.com/v1/models", "https://api.openai.com/v1/models"),
        ("anthropic", "https://api.anthropic.com/v1/chat/completions", "https://api.anthropic.com/v1/models?limit=1000", "https://api.anthropic.com/v1/models?limit=1000"),
        ("cohere", "https://api.cohere.ai/compatibility/v1/chat/completions", "https://api.cohere.ai/v1/models?page_size=1000", "https://api.cohere.ai/v1/models?page_size=1000"),
        ("openrouter", "https://openrouter.ai/api/v1/chat/completions", "https://openrouter.ai/api/v1/models", "https://openrouter.ai/api/v1/key"),
        ("google", "https://generativelanguage.googleapis.com/v1beta/openai/chat/completions", "https://generativelanguage.googleapis.com/v1beta/openai/models", "https://generativelanguage.googleapis.com/v1beta/openai/models"),
    ],
)  # fmt: skip
def test_where_vendors_are_asked(name: str, chat: str, models: str, probe: str) -> None:
    kind = KINDS[name]
    for base in (kind.base_url, kind.base_url + "/"):
        where = endpoint(name, base)
        assert chat_of(kind).request(where, {}, "m", False).url == chat
        assert kind.models is not None
        assert kind.models.request(where).url == models
        assert kind.probe is not None
        assert kind.probe.request(where).url == probe


@pytest.mark.parametrize(
    ("name", "probe", "models"),
    [
        ("vllm", "/health", "/v1/models"),
        ("ollama", "/api/version", "/api/tags"),
        ("llamacpp", "/health", "/v1/models"),
        ("openai-compatible", "/v1/models", "/v1/models"),
    ],
)
@pytest.mark.parametrize(
    "base", ["http://gpu:8000", "http://gpu:8000/", "http://gpu:8000/v1", "http://gpu:8000/v1/"]
)
def test_a_self_hosted_server_is_found_by_its_root_and_by_its_v1_form(
    name: str, probe: str, models: str, base: str
) -> None:
    kind, where = KINDS[name], endpoint(name, base)
    assert chat_of(kind).request(where, {}, "m", True).url == "http://gpu:8000/v1/chat/completions"
    assert kind.probe is not None
    assert kind.probe.request(where).url == f"http://gpu:8000{probe}"
    assert kind.models is not None
    assert kind.models.request(where).url == f"http://gpu:8000{models}"


def test_a_path_that_is_not_v1_is_taken_as_it_is() -> None:
    where = endpoint("openai-compatible", "https://proxy.example/llm/api")
    assert (
        chat_of(KINDS["openai-compatible"]).request(where, {}, "m", True).url
        == "https://proxy.example/llm/api/chat/completions"
    )


def sent(kind: str, body: dict[str, Any], *, stream: bool) -> dict[str, Any]:
    request = chat_of(KINDS[kind]).request(endpoint(kind), body, "upstream/model", stream)
    assert request.body is not None
    assert request.headers == (("Content-Type", "application/json"),)
    result = json.loads(request.body)
    assert isinstance(result, dict)
    return result


def test_a_streamed_request_always_asks_for_usage_and_keeps_the_callers_other_wishes() -> None:
    body = {
        "model": "x",
        "messages": [],
        "stream_options": {"include_usage": False, "include_obfuscation": False},
        "top_p": 0.5,
    }
    before = json.dumps(body)
    assert sent("openai", body, stream=True) == {
        "model": "upstream/model", "messages": [], "stream": True, "top_p": 0.5,
        "stream_options": {"include_usage": True, "include_obfuscation": False},
    }  # fmt: skip
    assert json.dumps(body) == before
    assert "stream_options" not in sent("openai", body, stream=False)
    assert sent("vllm", {"stream_options": "nonsense"}, stream=True)["stream_options"] == {
        "include_usage": True
    }


def test_mistral_which_refuses_stream_options_is_not_sent_any() -> None:
    assert "stream_options" not in sent("mistral", {"stream_options": {"include_usage": True}}, stream=True)


def test_integers_beyond_64_bits_and_lone_surrogates_reach_the_upstream_as_they_came() -> None:
    body = {"seed": 2**70, "user": "\ud800", "messages": []}
    assert sent("openai", body, stream=False) == {**body, "model": "upstream/model", "stream": False}


@pytest.mark.parametrize("name", REMOTE)
def test_a_key_travels_in_a_header_and_never_in_the_address(name: str) -> None:
    kind = KINDS[name]
    assert kind.authorize("sk-1") == (("Authorization", "Bearer sk-1"),)


def test_anthropics_list_of_models_takes_its_own_header() -> None:
    models = KINDS["anthropic"].models
    assert models is not None
    authorize = models.request(endpoint("anthropic")).authorize
    assert authorize is not None
    assert authorize("sk-1") == (("x-api-key", "sk-1"), ("anthropic-version", "2023-06-01"))


def delta(**content: Any) -> bytes:
    return json.dumps({"choices": [{"index": 0, "delta": content, "finish_reason": None}]}).encode()


@pytest.mark.parametrize(
    "content",
    [
        {"content": "x"}, {"content": [{"type": "text", "text": "x"}]}, {"reasoning_content": "x"}, {"reasoning": "x"},
        {"reasoning_details": [{"text": "x"}]}, {"refusal": "no"}, {"tool_calls": [{"index": 0}]}, {"function_call": {"name": "f"}},
        {"audio": {"data": "AA=="}}, {"audio": {"transcript": "x"}}, {"role": "assistant", "content": " "},
    ],
)  # fmt: skip
def test_content_reasoning_and_tool_calls_commit(content: dict[str, Any]) -> None:
    assert read_event(delta(**content)) == Event(commits=True)


@pytest.mark.parametrize(
    "content",
    [
        {}, {"role": "assistant"}, {"role": "assistant", "content": ""}, {"content": None, "reasoning_content": ""}, {"tool_calls": []},
        {"tool_calls": None, "refusal": None, "function_call": None}, {"audio": {"id": "a"}}, {"reasoning_details": []},
    ],
)  # fmt: skip
def test_a_role_or_empty_content_does_not_commit(content: dict[str, Any]) -> None:
    assert read_event(delta(**content)) == Event()


def test_a_finish_reason_commits_and_is_passed_on_as_it_is() -> None:
    event = read_event(b'{"choices":[{"delta":{},"finish_reason":"weird_reason"}]}')
    assert event == Event(commits=True, finish_reason="weird_reason", finished=1)


def test_the_end_of_a_stream() -> None:
    assert read_event(b"[DONE]") == read_event(b" [DONE] ") == Event(done=True)
    assert read_event(b"") == Event()


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"error": {"message": "x", "type": "server_error", "code": None}}, errors.UpstreamFailed),
        ({"error": {"message": "x", "code": 429}}, errors.UpstreamRateLimited),
        ({"error": {"message": "x", "code": "502"}}, errors.UpstreamFailed),
        ({"error": {"message": "x", "type": "overloaded_error"}}, errors.UpstreamFailed),
        ({"error": {"message": "x", "type": "rate_limit_error"}}, errors.UpstreamRateLimited),
        ({"error": {"message": "x", "type": "authentication_error"}}, errors.CredentialRejected),
        ({"error": {"message": "maximum context length is 10", "code": 400}}, errors.ContextLengthExceeded),
        ({"error": "an error was encountered while running the model"}, errors.UpstreamFailed),
        ({"object": "error", "message": "x", "type": "BadRequestError", "code": 400}, errors.UpstreamRefused),
        (
            {"choices": [{"delta": {"content": ""}, "finish_reason": "error"}], "error": {"code": 502}},
            errors.UpstreamFailed,
        ),
    ],
)
def test_f05_an_error_inside_a_200_is_an_error(
    data: dict[str, Any], expected: type[errors.ProviderError]
) -> None:
    encoded = json.dumps(data).encode()
    event = read_event(encoded)
    assert type(event.error) is expected
    assert not event.commits
    with pytest.raises(expected):
        read_completion(encoded)


@pytest.mark.parametrize(
    "data",
    [b"{", b"<html>", b"[1]", b"1", b"null", b'"x"', b"\xff\xfe", b'{"choices": 5}', b"{" * 5000, b"nan"],
)
def test_f06_garbage_is_a_protocol_error(data: bytes) -> None:
    with pytest.raises(errors.ProtocolError):
        read_event(data)
    with pytest.raises(errors.ProtocolError):
        read_completion(data)


@pytest.mark.parametrize(
    "body", [b"", b"  \n", b'{"choices": []}', b'{"choices": [], "usage": {"prompt_tokens": 1}}']
)
def test_f05_a_200_with_nothing_in_it_is_an_empty_response(body: bytes) -> None:
    with pytest.raises(errors.EmptyResponse):
        read_completion(body)


@pytest.mark.parametrize("bad", [-1, 2**63, 10**30, 1.5, "7", True, [], {}, float(10**20)])
def test_r36_counts_that_cannot_be_true_are_not_believed(bad: Any) -> None:
    assert read_usage({"usage": {"prompt_tokens": bad, "completion_tokens": 3}}) is None
    assert read_usage({"usage": {"prompt_tokens": 3, "completion_tokens": bad}}) is None
    usage = read_usage(
        {
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": bad},
                "completion_tokens_details": bad,
            }
        }
    )
    assert usage is not None
    assert (usage.prompt, usage.completion, usage.cached, usage.reasoning) == (5, 3, 0, 0)


def test_r36_parts_are_never_more_than_the_whole() -> None:
    usage = read_usage(
        {
            "usage": {
                "prompt_tokens": 5,
                "completion_tokens": 3,
                "prompt_tokens_details": {"cached_tokens": 50, "cache_write_tokens": 60},
                "completion_tokens_details": {"reasoning_tokens": 70},
            }
        }
    )
    assert usage is not None
    assert (usage.cached, usage.cache_write, usage.reasoning) == (5, 5, 3)


@pytest.mark.parametrize("usage", [None, "x", [], 5, {}])
def test_usage_counts_only_when_it_is_an_object(usage: Any) -> None:
    event = read_event(json.dumps({"choices": [{"delta": {"content": "x"}}], "usage": usage}).encode())
    assert event == Event(commits=True)


def test_only_a_chunk_without_choices_is_there_for_usage_alone() -> None:
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    assert read_event(json.dumps({"choices": [], "usage": usage}).encode()).usage_only
    assert not read_event(json.dumps({"choices": [], "prompt_filter_results": []}).encode()).usage_only
    assert not read_event(json.dumps({"choices": [{"delta": {}}], "usage": usage}).encode()).usage_only


@pytest.mark.parametrize(
    ("delta", "text"),
    [
        ({"content": "a"}, b"a"),
        ({"role": "assistant", "content": "a"}, b"a"),
        ({"content": "", "reasoning_content": "so"}, b"so"),
        ({"content": 'say "content": "x"'}, rb"say \"content\": \"x\""),
        ({"tool_calls": [{"index": 0, "function": {"arguments": '{"a'}}]}, rb"{\"a"),
    ],
)
@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_an_event_is_cut_around_its_text(
    delta: dict[str, Any], text: bytes, separators: tuple[str, str]
) -> None:
    data = {"id": "x", "choices": [{"index": 0, "delta": delta, "finish_reason": None}], "usage": None}
    raw = b"data: " + json.dumps(data, separators=separators).encode() + b"\n\n"
    around = around_text(raw)
    assert around is not None and text.join(around) == raw


@pytest.mark.parametrize("delta", [{}, {"content": ""}, {"content": None}, {"refusal": "no"}])
def test_an_event_without_a_text_is_not_cut(delta: dict[str, Any]) -> None:
    assert around_text(b"data: " + json.dumps({"choices": [{"delta": delta}]}).encode() + b"\n\n") is None


@given(
    payload=st.dictionaries(
        st.sampled_from(["choices", "usage", "error", "object", "x_groq", "model"]), JSON_VALUES
    )
)
def test_f06_whatever_json_an_upstream_sends_only_our_errors_come_out(payload: dict[str, Any]) -> None:
    data = json.dumps(payload).encode()
    for read in (read_event, read_completion, lambda body: read_models("", body)):
        try:
            read(data)
        except errors.ProviderError:
            continue


@given(
    status=st.integers(0, 999),
    body=st.one_of(
        st.binary(max_size=200), JSON_VALUES.map(lambda value: json.dumps({"error": value}).encode())
    ),
    retry=st.text(max_size=12),
)
def test_f06_every_refusal_is_classified(status: int, body: bytes, retry: str) -> None:
    error = classify(status, {"Retry-After": retry}, body)
    assert isinstance(error, errors.UpstreamError)
    assert error.retry_after is None or 0 <= error.retry_after <= 300
    assert len(error.detail) <= errors.MAX_DETAIL
    assert len(error.text) <= errors.MAX_DETAIL


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "2"}, 2.0),
        ({"retry-after": "0"}, 0.0),
        ({"RETRY-AFTER": "1000000000"}, 300.0),
        ({"Retry-After": "1e400"}, None),
        ({"Retry-After": "nan"}, None),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({}, None),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:30 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 30.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:30 GMT"}, 0.0),
        ({"Retry-After": "Wed, 21 Oct 2099 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:30 GMT"}, 300.0),
        ({"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        ({"Retry-After": "Wed, 99 Oct 2026 07:28:00 GMT", "Date": "Wed, 21 Oct 2026 07:28:30 GMT"}, None),
        ({"retry-after-ms": "1500"}, 1.5),
    ],
)
def test_f07_when_to_come_back_is_read_in_every_form_and_bounded(
    headers: dict[str, str], seconds: float | None
) -> None:
    error = classify(429, headers, b"")
    assert isinstance(error, errors.UpstreamRateLimited)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (200, "ProtocolError"), (301, "UpstreamRedirect"), (308, "UpstreamRedirect"), (400, "UpstreamRefused"), (401, "CredentialRejected"),
        (402, "CredentialRejected"), (403, "CredentialRejected"), (404, "UpstreamModelNotFound"), (405, "UpstreamFailed"),
        (408, "UpstreamTimeout"), (413, "UpstreamRefused"), (422, "UpstreamRefused"), (429, "UpstreamRateLimited"),
        (500, "UpstreamFailed"), (502, "UpstreamFailed"), (503, "UpstreamFailed"), (504, "UpstreamFailed"), (529, "UpstreamFailed"),
    ],
)  # fmt: skip
def test_what_a_status_alone_means(status: int, expected: str) -> None:
    assert type(classify(status, {}, b"")).__name__ == expected


def test_the_upstreams_words_are_passed_on_for_the_callers_mistake_and_only_then() -> None:
    body = json.dumps({"error": {"message": "temperature is " + "x" * 5000, "param": "temperature"}}).encode()
    refused = classify(422, {}, body)
    assert refused.text.startswith("temperature is")
    assert len(refused.text) == errors.MAX_DETAIL
    failed = classify(500, {}, b'{"error": {"message": "db at 10.0.0.3 is gone"}}')
    assert "10.0.0.3" not in failed.text
    assert "10.0.0.3" in failed.detail


def test_r37_a_long_error_text_is_searched_in_no_time() -> None:
    started = time.process_time()
    for text in ("model " * 500_000, "content " * 400_000, "a" * 3_000_000):
        classify(400, {}, json.dumps({"error": {"message": text}}).encode())
    assert time.process_time() - started < 1.0


def echo(body: dict[str, Any]) -> Answer:
    kind = KINDS["echo"]
    assert kind.local is not None
    return kind.local(chat_of(kind).request(endpoint("echo"), body, "echo", bool(body.get("stream"))))


def test_echo_says_back_the_last_message_of_the_user_word_by_word() -> None:
    messages = [
        {"role": "user", "content": "first"},
        {"role": "user", "content": [{"type": "text", "text": "say\nit  again "}, {"type": "image_url"}]},
        {"role": "assistant", "content": "no"},
    ]
    answer = echo({"messages": messages, "stream": True})
    chunks = [event.data for event in sse.events(answer.body)]
    read = [read_event(chunk) for chunk in chunks]
    said = [json.loads(chunk)["choices"][0]["delta"].get("content", "") for chunk in chunks[:-2]]
    assert said == ["", "say", "\nit", "  again", " ", ""]
    assert [event.finish_reason for event in read if event.finish_reason] == ["stop"]
    assert (read[-2].usage_only, read[-1].done) == (True, True)
    assert read[-2].usage is not None
    assert (read[-2].usage.prompt, read[-2].usage.completion) == (5, 3)
    whole = echo({"messages": messages})
    assert json.loads(whole.body)["choices"][0]["message"]["content"] == "say\nit  again "
    assert read_completion(whole.body).finish_reason == "stop"


@pytest.mark.parametrize(
    "messages", [None, 5, [], [5], [{"role": "user"}], [{"role": "user", "content": 5}], [{"role": "system"}]]
)
def test_echo_survives_every_shape_of_messages(messages: Any) -> None:
    assert read_completion(echo({"messages": messages}).body).finish_reason == "stop"
    assert echo({"messages": messages, "stream": True}).body.endswith(b"data: [DONE]\n\n")


def test_echo_lists_its_one_model_and_probes_online() -> None:
    kind = KINDS["echo"]
    assert kind.local is not None
    assert kind.models is not None
    assert kind.probe is not None
    where = endpoint("echo")
    assert [model.id for model in kind.models.parse(kind.local(kind.models.request(where)).body)] == ["echo"]
    assert kind.probe.read(kind.local(kind.probe.request(where))).status == "online"


def test_adapters_touch_no_socket_no_clock_no_setting_and_no_row() -> None:
    forbidden = re.compile(
        r"^\s*(?:import|from) (?:django|aiohttp|httpx|socket|time|datetime|asyncio|os)\b", re.MULTILINE
    )
    root = Path(adapters.__file__).parent
    for path in [*root.glob("*.py"), root.parent / "sse.py", root.parent / "destination.py"]:
        assert not forbidden.search(path.read_text()), path.name


def test_r53_the_words_of_an_error_inside_a_good_answer_are_not_passed_on() -> None:
    """It may repeat the credential, and only answers with an error's status are cleaned of it."""
    told = {"error": {"message": "Bearer sk-secret-0123456789 may not do this", "code": 400}}
    error = read_event(json.dumps(told).encode()).error
    assert isinstance(error, errors.UpstreamRefused)
    assert "secret" not in error.text
