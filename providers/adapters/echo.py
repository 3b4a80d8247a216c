"""A provider inside this process: it says back what the last user message said. For a first try and for tests.

It keeps OpenAI's dialect to the letter, so that whatever works with it works with the others. Tokens are words.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from providers.adapters import openai
from providers.adapters.addresses import vendor_api
from providers.adapters.failures import classify
from providers.adapters.json_values import dump, mapping, object_or_empty, text
from providers.wire import Answer, Kind, WireRequest

MODEL = "echo"

_WORD = re.compile(r"\s*\S+|\s+")


def answer(request: WireRequest) -> Answer:
    """The whole answer to one request: a completion, a stream of chunks, or the list of models."""
    if request.method == "GET":
        return _json(
            {
                "object": "list",
                "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "penstock"}],
            }
        )
    body = object_or_empty(request.body or b"")
    said = last_user_text(body)
    base = {
        "id": f"chatcmpl-{hashlib.sha256(request.body or b'').hexdigest()[:24]}",
        "created": 0,
        "model": text(body.get("model")) or MODEL,
    }
    if not body.get("stream"):
        message = {"role": "assistant", "content": said}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        return _json({**base, "object": "chat.completion", "choices": [choice], "usage": _usage(body, said)})
    chunks = b"".join(
        b"data: " + dump({**base, "object": "chat.completion.chunk", **chunk}) + b"\n\n"
        for chunk in _chunks(body, said)
    )
    return Answer(200, {"Content-Type": "text/event-stream"}, chunks + b"data: [DONE]\n\n")


def last_user_text(body: Mapping[str, Any]) -> str:
    """The text of the last message of the user; of a message in parts, its text parts."""
    messages = body.get("messages")
    for message in reversed(messages if isinstance(messages, list) else []):
        if mapping(message).get("role") == "user":
            return _text_of(message)
    return ""


def _text_of(message: Any) -> str:
    content = mapping(message).get("content")
    parts = content if isinstance(content, list) else [{"text": content}]
    return " ".join(filter(None, (text(mapping(part).get("text")) for part in parts)))


def _chunks(body: Mapping[str, Any], said: str) -> Iterator[dict[str, Any]]:
    yield _chunk({"role": "assistant", "content": ""})
    for word in _WORD.findall(said):
        yield _chunk({"content": word})
    yield _chunk({}, finish_reason="stop")
    if mapping(body.get("stream_options")).get("include_usage"):
        yield {"choices": [], "usage": _usage(body, said)}


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


def _usage(body: Mapping[str, Any], said: str) -> dict[str, int]:
    messages = body.get("messages")
    prompt = sum(
        len(_text_of(message).split()) for message in (messages if isinstance(messages, list) else [])
    )
    completion = len(said.split())
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _json(payload: Mapping[str, Any]) -> Answer:
    return Answer(200, {"Content-Type": "application/json"}, dump(payload))


KIND = Kind(
    name="echo",
    label="Echo (built in)",
    self_hosted=False,
    # The top-level domain is reserved never to resolve (RFC 6761): should it ever be dialled, nothing is reached.
    base_url="https://echo.invalid/v1",
    authorize=openai.bearer,
    classify=classify,
    chat=openai.chat(vendor_api),
    models=openai.models(vendor_api),
    probe=openai.probe(lambda endpoint: f"{vendor_api(endpoint)}/models", openai.read_listing),
    local=answer,
)
