"""The official OpenAI client, unmodified, through Penstock to a real llama.cpp server."""

from __future__ import annotations

import json
import time
from typing import Any

import httpx
import openai
import pytest

from tests.support.gateway import Gateway
from tests.support.llama import Llama, must_call_a_tool

pytestmark = pytest.mark.no_database

HELLO: Any = [{"role": "user", "content": "Say something"}]
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]


@pytest.fixture(scope="module")
def key(gateway: Gateway, llama: Llama) -> str:
    """The server is active for chat; the key may use everything."""
    return gateway.provide(llama.url, slug="local", kind="llamacpp", api_key=str(llama.key), models=["tiny"])


@pytest.fixture
def client(gateway: Gateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=30)


def records(gateway: Gateway, status: str) -> list[dict[str, Any]]:
    code = (
        "import json; from proxy.models import UsageRecord; "
        f"print(json.dumps(list(UsageRecord.objects.filter(status={status!r}).order_by('id').values("
        "'request_id','model','provider','prompt_tokens','completion_tokens','tokens_source','stream','ttft_ms'))))"
    )
    found: list[dict[str, Any]] = json.loads(gateway.shell(code).splitlines()[-1])
    return found


def test_a_completion(client: openai.OpenAI) -> None:
    completion = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=8)
    assert completion.choices[0].message.content
    assert completion.usage is not None and completion.usage.completion_tokens == 8
    assert completion.choices[0].finish_reason == "length"


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    chunks = list(
        client.chat.completions.create(
            model="local/tiny",
            messages=HELLO,
            max_tokens=8,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 8


def test_a_stream_without_usage_has_none(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model="auto", messages=HELLO, max_tokens=4, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


async def test_the_asynchronous_client(gateway: Gateway, key: str) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{gateway.url}/v1", api_key=key, max_retries=0, timeout=30
    ) as client:
        whole = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=4)
        assert whole.choices[0].message.content
        stream = await client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=6, stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream])


def test_tool_calls_whole_and_streamed(client: openai.OpenAI) -> None:
    """The tiny model's arguments are noise, so the whole answer is the measure of the streamed one."""
    extra = must_call_a_tool()
    choice = extra.pop("tool_choice", "required")
    asked: Any = {
        "model": "tiny",
        "messages": HELLO,
        "tools": TOOLS,
        "tool_choice": choice,
        "max_tokens": 64,
        "temperature": 0,
        "extra_body": {**extra, "cache_prompt": False},
    }
    calls: Any = client.chat.completions.create(**asked).choices[0].message.tool_calls

    name, arguments = "", ""
    for chunk in client.chat.completions.create(**asked, stream=True):
        for call in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            name = name or call.function.name or ""
            arguments += call.function.arguments or ""

    assert calls[0].function.name == name == "weather"
    assert calls[0].function.arguments == arguments != ""


def test_a_cancelled_stream_stops_and_is_recorded(gateway: Gateway, client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=3000, stream=True)
    next(iter(stream))
    stream.close()

    deadline = time.monotonic() + 15
    while not (found := records(gateway, "client_disconnected")):
        assert time.monotonic() < deadline, gateway.logs()
    assert found[0]["tokens_source"] == "estimated" and 0 < found[0]["completion_tokens"] < 3000


def test_models_and_errors_as_the_client_expects_them(gateway: Gateway, client: openai.OpenAI) -> None:
    assert {model.id for model in client.models.list()} == {"tiny", "local/tiny"}
    assert client.models.retrieve("local/tiny").owned_by == "local"
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="nothing", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="wrong", max_retries=0).models.list()
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model="tiny", messages=[])
    assert wrong.value.param == "messages"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "word " * 20_000}], max_tokens=4
        )
    assert long.value.code == "context_length_exceeded"


def test_every_answer_has_its_record_with_the_providers_numbers(
    gateway: Gateway, client: openai.OpenAI
) -> None:
    headers = {"x-request-id": "ledger-1"}
    client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=5, extra_headers=headers)
    list(
        client.chat.completions.create(
            model="tiny", messages=HELLO, max_tokens=7, stream=True, extra_headers=headers
        )
    )

    deadline = time.monotonic() + 20
    while len(found := [r for r in records(gateway, "success") if r["request_id"] == "ledger-1"]) < 2:
        assert time.monotonic() < deadline, gateway.logs()
    assert [record["completion_tokens"] for record in found] == [5, 7]
    assert {record["tokens_source"] for record in found} == {"provider"}
    assert [record["stream"] for record in found] == [False, True]
    assert found[1]["ttft_ms"] is not None


def test_operations_answer(gateway: Gateway) -> None:
    assert httpx.get(f"{gateway.url}/livez").json() == {"status": "ok"}
    assert httpx.get(f"{gateway.url}/readyz").json()["details"]["database"] == "ok"
    assert "penstock_attempts_total" in httpx.get(f"{gateway.url}/metrics").text
    assert httpx.get(f"{gateway.url}/api/v1/health").json()["status"] in {"ok", "degraded"}
    redirect = httpx.get(f"{gateway.url}/")
    assert redirect.headers["location"] == "/admin/"
