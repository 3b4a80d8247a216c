"""OpenAI's chat completions and list of models: the dialect that every kind here speaks, some with an accent.

Source: https://platform.openai.com/docs/api-reference/chat and .../models; the accents are in the functions' docstrings.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import orjson

from providers import errors
from providers.adapters.failures import classify_event
from providers.adapters.json_values import count, dump, mapping, parse_object, size, text
from providers.wire import (
    Answer,
    Chat,
    Completion,
    Endpoint,
    Event,
    Headers,
    Model,
    Models,
    Probe,
    Purpose,
    Reading,
    Usage,
    WireRequest,
)

Address = Callable[[Endpoint], str]

JSON: Headers = (("Content-Type", "application/json"),)

# Possessive: with a place to come back to for every character, a megabyte of text would take 130 MB and 0.2 s.
_TEXT = re.compile(rb'"(?:content|reasoning_content|reasoning|arguments)"\s*:\s*"((?:[^"\\]++|\\.)++)"')


def around_text(raw: bytes) -> tuple[bytes, bytes] | None:
    """A chunk is cut at its first text that is not empty. Inside another text such a name would have its quotes escaped."""
    match = _TEXT.search(raw)
    return None if match is None else (raw[: match.start(1)], raw[match.end(1) :])


_COMMITTING = (
    "content",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "refusal",
    "tool_calls",
    "function_call",
)


def bearer(secret: str) -> Headers:
    return (("Authorization", f"Bearer {secret}"),)


Prefill = Callable[[Mapping[str, Any], str], Mapping[str, Any]]


def chat(address: Address, *, asks_usage: bool = True, prefill: Prefill | None = None) -> Chat:
    """`asks_usage` is false where `stream_options` is refused and usage comes unasked. prefill: see wire.Chat."""
    return Chat(
        request=partial(chat_request, address, asks_usage=asks_usage),
        around_text=around_text,
        read_event=read_event,
        read_completion=read_completion,
        prefill=prefill,
    )


def prefilled(
    body: Mapping[str, Any], text: str, *, message: Mapping[str, Any] | None = None, **fields: Any
) -> Mapping[str, Any]:
    """The request with `text` as the beginning of the assistant's answer. message, fields: what a kind wants besides."""
    last = {"role": "assistant", "content": text, **(message or {})}
    return {**body, **fields, "messages": [*body["messages"], last]}


def chat_request(
    address: Address,
    endpoint: Endpoint,
    body: Mapping[str, Any],
    model: str,
    stream: bool,
    *,
    asks_usage: bool = True,
) -> WireRequest:
    sent = {**body, "model": model, "stream": stream}
    if stream and asks_usage:
        sent["stream_options"] = {**mapping(body.get("stream_options")), "include_usage": True}
    else:
        sent.pop("stream_options", None)
    return WireRequest("POST", f"{address(endpoint)}/chat/completions", JSON, dump(sent))


def read_event(data: bytes) -> Event:
    """The meaning of one event's data. Raises ProtocolError when it is neither a JSON object nor `[DONE]`."""
    stripped = data.strip()
    if stripped == b"[DONE]":
        return Event(done=True)
    if not stripped:
        return Event()
    chunk = parse_object(stripped)
    if error := _error_in(chunk):
        return Event(error=error)
    choices = chunk.get("choices")
    if choices is not None and not isinstance(choices, list):
        raise errors.ProtocolError(detail="`choices` is not a list")
    usage = read_usage(chunk)
    reasons = _finish_reasons(choices or ())
    return Event(
        commits=bool(reasons) or any(_commits(choice) for choice in choices or ()),
        finish_reason=reasons[0] if reasons else None,
        finished=len(reasons),
        usage=usage,
        usage_only=choices == [] and isinstance(chunk.get("usage"), dict),
    )


def _error_in(payload: Mapping[str, Any]) -> errors.ProviderError | None:
    """`{"error": {...}}`, `{"error": "text"}` (Ollama) and `{"object": "error"}` (vLLM), also inside a 200."""
    if payload.get("error") or payload.get("object") == "error":
        return classify_event(payload)
    return None


def _commits(choice: Any) -> bool:
    """Has this choice of a chunk something of the answer in it? A role alone, or empty text, is not an answer."""
    delta = mapping(mapping(choice).get("delta"))
    return any(delta.get(name) for name in _COMMITTING) or _audio(delta)


def _audio(delta: Mapping[str, Any]) -> bool:
    audio = mapping(delta.get("audio"))
    return bool(audio.get("data") or audio.get("transcript"))


def _finish_reasons(choices: Iterable[Any]) -> list[str]:
    """As the provider wrote them: an unknown reason is never called `stop`."""
    return [reason for choice in choices if (reason := text(mapping(choice).get("finish_reason")))]


def read_usage(payload: Mapping[str, Any]) -> Usage | None:
    """Usage as told, None when there is none or when its sums cannot be true; a part that cannot be true is 0.

    Cached tokens: OpenAI `prompt_tokens_details.cached_tokens`, DeepSeek `prompt_cache_hit_tokens`; written to a cache:
    OpenRouter `cache_write_tokens`. Groq also puts the whole under `x_groq`.
    """
    told = mapping(payload.get("usage")) or mapping(mapping(payload.get("x_groq")).get("usage"))
    if not told.keys() & {"prompt_tokens", "completion_tokens"}:
        return None
    prompt, completion = count(told.get("prompt_tokens")), count(told.get("completion_tokens"))
    if prompt is None or completion is None:
        return None
    inputs, outputs = (
        mapping(told.get("prompt_tokens_details")),
        mapping(told.get("completion_tokens_details")),
    )
    cached = count(inputs.get("cached_tokens")) or count(told.get("prompt_cache_hit_tokens")) or 0
    return Usage(
        prompt=prompt,
        completion=completion,
        cached=min(cached, prompt),
        cache_write=min(count(inputs.get("cache_write_tokens")) or 0, prompt),
        reasoning=min(count(outputs.get("reasoning_tokens")) or 0, completion),
    )


def read_completion(body: bytes) -> Completion:
    """A whole 200 body. Raises the error that is in it, EmptyResponse, or ProtocolError."""
    if not body.strip():
        raise errors.EmptyResponse
    payload = parse_object(body)
    if error := _error_in(payload):
        raise error
    choices = payload.get("choices")
    if choices == []:
        raise errors.EmptyResponse(detail="`choices` is empty")
    if not isinstance(choices, list):
        raise errors.ProtocolError(detail="there are no `choices`")
    return Completion(usage=read_usage(payload), finish_reason=next(iter(_finish_reasons(choices)), None))


def models(address: Address, *, path: str = "/models", prefix: str = "") -> Models:
    """`prefix` is taken off every id, where a provider lists `models/x` and is asked for `x`."""
    return Models(
        request=lambda endpoint: WireRequest("GET", f"{address(endpoint)}{path}"),
        parse=partial(read_models, prefix),
    )


def read_models(prefix: str, body: bytes) -> tuple[Model, ...]:
    """A list of models under `data` or `models`, or bare (Together). Raises ProtocolError when it is no list."""
    rows = _rows(body)
    found: dict[str, Model] = {}
    for row in rows:
        model = _model(mapping(row), prefix)
        if model.id:
            found.setdefault(model.id, model)
    return tuple(found.values())


def _rows(body: bytes) -> list[Any]:
    try:
        payload = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise errors.ProtocolError(detail=f"not JSON: {error}") from None
    if isinstance(payload, dict):
        payload = payload.get("data", payload.get("models"))
    if not isinstance(payload, list):
        raise errors.ProtocolError(detail="there is no list of models")
    return payload


def _model(row: Mapping[str, Any], prefix: str) -> Model:
    name = (text(row.get("id")) or text(row.get("name")))[:255].removeprefix(prefix)
    capabilities = _capabilities(row)
    return Model(
        id=name,
        purposes=guess_purposes(name, (*capabilities, text(row.get("type")))),
        context_window=_context_window(row),
        capabilities=capabilities,
    )


def _context_window(row: Mapping[str, Any]) -> int | None:
    """Under the name that each provider has for it."""
    names = (
        "context_length",  # OpenRouter, Together, Fireworks, Cohere
        "context_window",  # Groq
        "max_model_len",  # vLLM
        "max_context_length",  # Mistral
        "max_input_tokens",  # Anthropic
    )
    told = (size(row.get(name)) for name in names)
    hosts = row.get("providers")
    offered = [size(mapping(host).get("context_length")) for host in hosts] if isinstance(hosts, list) else []
    # Behind Hugging Face's router any of its hosts may answer, so only the smallest window is sure.
    smallest = min((window for window in offered if window), default=None)
    return next((window for window in told if window), None) or smallest


def _capabilities(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Mistral `capabilities` (name -> bool), Cohere `endpoints` (a list of words), Fireworks `supports_...` (bool)."""
    told = row.get("capabilities") or row.get("endpoints")
    if isinstance(told, dict):
        told = [name for name, has in told.items() if has is True]
    words = (
        told
        if isinstance(told, list)
        else [name for name in row if name.startswith("supports_") and row[name] is True]
    )
    return tuple(word[:64] for word in words[:32] if isinstance(word, str))


def guess_purposes(name: str, words: Iterable[str] = ()) -> tuple[Purpose, ...]:
    """What a model is for, where the provider or the model's name says it plainly; else nothing is claimed."""
    lowered = f"{name} {' '.join(words)}".lower()
    told = set(words)
    purposes: list[Purpose] = []
    if told & {"chat", "completion_chat", "completion", "supports_chat"}:
        purposes.append("chat")
    if "embed" in lowered or told & {"feature-extraction"}:
        purposes.append("embeddings")
    if "rerank" in lowered:
        purposes.append("reranking")
    return tuple(purposes)


def probe(url: Callable[[Endpoint], str], read: Callable[[Answer], Reading]) -> Probe:
    return Probe(request=lambda endpoint: WireRequest("GET", url(endpoint)), read=read)


def read_listing(answer: Answer) -> Reading:
    """Online when it is a 2xx with a list of models in it: a portal's login page is a 200 too."""
    if refused := refusal(answer):
        return refused
    try:
        rows = _rows(answer.body)
    except errors.ProtocolError:
        return Reading("degraded", answer.status, "The answer is not a list of models.")
    return Reading("online", answer.status, f"{len(rows)} models")


def read_any_object(answer: Answer) -> Reading:
    """Online when it is a 2xx with a JSON object in it."""
    if refused := refusal(answer):
        return refused
    try:
        parse_object(answer.body)
    except errors.ProtocolError:
        return Reading("degraded", answer.status, "The answer is not JSON.")
    return Reading("online", answer.status)


def refusal(answer: Answer) -> Reading | None:
    """The reading of an answer that is not 2xx."""
    if 200 <= answer.status < 300:
        return None
    if answer.status in {401, 403}:
        return Reading("degraded", answer.status, "The credential is not accepted.")
    if 300 <= answer.status < 400:
        return Reading("degraded", answer.status, "The answer is a redirect, which is never followed.")
    return Reading("degraded", answer.status, f"The answer is HTTP {answer.status}.")
