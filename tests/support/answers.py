"""What a healthy OpenAI-compatible upstream answers, and the errors it makes on purpose.

Everything is deterministic: the n-th content chunk is the word `word<n> `, the prompt's tokens are its words, and the
answer's tokens are its content chunks.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tests.support.http_server import Behaviour, Exchange, Headers
from tests.support.ledger import Record

JSON = {"Content-Type": "application/json"}
SSE = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
DONE = b"data: [DONE]\n\n"
MODELS = ("tiny", "big")
CREATED = 1_700_000_000
LEAKY_HEADERS = {
    "Set-Cookie": "upstream_session=abc; Path=/",
    "Server": "upstream-internal/1.2",
    "X-Powered-By": "upstream",
    "X-Internal-Host": "node-7.internal",
    "OpenAI-Organization": "org-secret",
    "Access-Control-Allow-Origin": "*",
    "Strict-Transport-Security": "max-age=1",
    "X-Request-Id": "upstream-request-1",
}


def words(count: int) -> tuple[str, ...]:
    return tuple(f"word{number} " for number in range(1, count + 1))


@dataclass(frozen=True, slots=True)
class Answer:
    """A complete answer to a chat or text completion.

    texts: the content chunks. reasoning: chunks of `reasoning_content` before them. tool: (name, arguments in pieces) of one
    tool call instead of content. usage: whether the stream ends with a usage chunk (None: when the caller asked for it).
    done: whether `[DONE]` ends the stream. delay: seconds before each content chunk; first_after: before the first one, after
    the head and the role. finish: the finish reason (None: the stream never says one).
    """

    texts: Sequence[str] = words(5)
    reasoning: Sequence[str] = ()
    tool: tuple[str, Sequence[str]] | None = None
    usage: bool | None = None
    finish: str | None = "stop"
    done: bool = True
    role: bool = True
    delay: float = 0.0
    first_after: float = 0.0

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def tokens(self, request: Record) -> dict[str, int]:
        prompt = max(1, len(json.dumps(_prompt(request.json)).split()))
        count = len(self.texts) + len(self.reasoning) + (len(self.tool[1]) if self.tool else 0)
        return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}

    def deltas(self) -> Iterator[dict[str, Any]]:
        """The content deltas, in order: what counts as a chunk."""
        for text in self.reasoning:
            yield {"reasoning_content": text}
        if self.tool is None:
            for text in self.texts:
                yield {"content": text}
            return
        name, pieces = self.tool
        for number, piece in enumerate(pieces):
            call: dict[str, Any] = {"index": 0, "function": {"arguments": piece}}
            if number == 0:
                call = {
                    "index": 0,
                    "id": "call_1",
                    "type": "function",
                    "function": {"name": name, "arguments": piece},
                }
            yield {"tool_calls": [call]}

    def opening(self, request: Record) -> Iterator[bytes]:
        """The events before the content: the role."""
        if self.role and request.path.endswith("/chat/completions"):
            yield event(_chunk(request, {"role": "assistant", "content": ""}))

    def content(self, request: Record) -> Iterator[bytes]:
        for delta in self.deltas():
            yield event(_chunk(request, delta))

    def closing(self, request: Record) -> Iterator[bytes]:
        """The events after the content: finish reason, usage, [DONE]."""
        if self.finish is not None:
            yield event(_chunk(request, {}, finish=self.finish))
        options = request.json.get("stream_options") if isinstance(request.json, dict) else None
        asked = isinstance(options, dict) and options.get("include_usage") is True
        if self.usage or (self.usage is None and asked):
            yield event({**_chunk(request, None), "usage": self.tokens(request)})
        if self.done:
            yield DONE

    def whole(self, request: Record) -> dict[str, Any]:
        """The answer to a request that is not streamed."""
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "text": self.text}
        if request.path.endswith("/chat/completions"):
            message: dict[str, Any] = {"role": "assistant", "content": None if self.tool else self.text}
            if self.reasoning:
                message["reasoning_content"] = "".join(self.reasoning)
            if self.tool:
                function = {"name": self.tool[0], "arguments": "".join(self.tool[1])}
                message["tool_calls"] = [{"id": "call_1", "type": "function", "function": function}]
            choice = {"index": 0, "finish_reason": self.finish, "message": message}
        body = {**_envelope(request, chunk=False), "choices": [choice]}
        return body if self.usage is False else {**body, "usage": self.tokens(request)}


def event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def error_body(message: str, code: str | int | None, kind: str = "invalid_request_error") -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def ok(
    answer: Answer | None = None, *, headers: Headers | None = None, cut: int = 0, **changes: Any
) -> Behaviour:
    """Answer as the path and `stream` ask for. Keyword arguments are fields of `Answer`; `chunks=n` gives n words.

    headers: more response headers. cut: send in pieces of so many bytes, each written for itself.
    """
    chosen = _answer(answer, changes)

    async def behave(exchange: Exchange) -> None:
        exchange.cut = cut
        if exchange.request.path.rpartition("/")[2] != "completions":
            await exchange.answer(*_other(exchange.request), {**JSON, **(headers or {})})
        elif exchange.streamed:
            await begin_stream(exchange, chosen, headers=headers)
            await send_content(exchange, chosen)
            for data in chosen.closing(exchange.request):
                await exchange.body(data)
            await exchange.end()
        else:
            await asyncio.sleep(chosen.first_after)
            body = json.dumps(chosen.whole(exchange.request)).encode()
            await exchange.answer(200, body, {**JSON, **(headers or {})})

    return behave


def status(
    code: int, *, retry_after: str | float | None = None, message: str = "", error_code: str = ""
) -> Behaviour:
    """An HTTP error with an OpenAI error body; retry_after: seconds, or an HTTP date as text."""

    async def behave(exchange: Exchange) -> None:
        body = error_body(
            message or f"scripted {code}", error_code or None, "server_error" if code >= 500 else "error"
        )
        headers = {} if retry_after is None else {"Retry-After": f"{retry_after}"}
        await exchange.answer(code, json.dumps(body).encode(), {**JSON, **headers})

    return behave


def context_too_long() -> Behaviour:
    text = "This model's maximum context length is 4096 tokens, your messages resulted in 5000 tokens."
    return status(400, message=text, error_code="context_length_exceeded")


def content_policy() -> Behaviour:
    return status(
        400, message="Your request was rejected by the safety system.", error_code="content_policy_violation"
    )


def unauthorized() -> Behaviour:
    """401 whose message repeats the received key, as some upstreams do."""

    async def behave(exchange: Exchange) -> None:
        key = exchange.request.headers.get("authorization", "nothing")
        body = error_body(f"Incorrect API key provided: {key}", "invalid_api_key")
        await exchange.answer(401, json.dumps(body).encode(), {**JSON, "X-Echo": key})

    return behave


def raw(body: bytes, *, code: int = 200, headers: Headers | None = None) -> Behaviour:
    """Exactly this body, with its length."""

    async def behave(exchange: Exchange) -> None:
        await exchange.answer(code, body, headers or JSON)

    return behave


def events(pieces: Sequence[bytes], *, delay: float = 0.0, headers: Headers | None = None) -> Behaviour:
    """Exactly these pieces as a stream that ends well: for dialects and oddities that `Answer` does not know."""

    async def behave(exchange: Exchange) -> None:
        await exchange.head(200, headers or SSE)
        for piece in pieces:
            await asyncio.sleep(delay)
            await exchange.chunk(piece)
        await exchange.end()

    return behave


async def begin_stream(
    exchange: Exchange, answer: Answer, *, headers: Headers | None = None, length: int | None = None
) -> None:
    """Head and role of a stream."""
    await exchange.head(200, {**SSE, **(headers or {})}, length=length)
    for data in answer.opening(exchange.request):
        await exchange.body(data)


async def send_content(exchange: Exchange, answer: Answer, *, chunks: int | None = None) -> None:
    """The content chunks, all or the first so many, at the answer's pace."""
    for number, data in enumerate(answer.content(exchange.request)):
        if number == chunks:
            break
        await asyncio.sleep(answer.delay + (0 if number else answer.first_after))
        await exchange.chunk(data)


def _answer(answer: Answer | None, changes: dict[str, Any]) -> Answer:
    if "chunks" in changes:
        changes = {**changes, "texts": words(changes["chunks"])}
        del changes["chunks"]
    return replace(answer or Answer(), **changes)


def _prompt(body: Any) -> Any:
    return [body.get(name) for name in ("messages", "prompt", "input")] if isinstance(body, dict) else None


def _envelope(request: Record, *, chunk: bool) -> dict[str, Any]:
    kind = "text_completion"
    if request.path.endswith("/chat/completions"):
        kind = "chat.completion.chunk" if chunk else "chat.completion"
    return {
        "id": f"chatcmpl-{request.number}",
        "object": kind,
        "created": CREATED,
        "model": request.model or "tiny",
    }


def _chunk(request: Record, delta: dict[str, Any] | None, *, finish: str | None = None) -> dict[str, Any]:
    envelope = _envelope(request, chunk=True)
    if delta is None:
        return {**envelope, "choices": []}
    content = (
        {"delta": delta} if envelope["object"] != "text_completion" else {"text": delta.get("content", "")}
    )
    return {**envelope, "choices": [{"index": 0, **content, "finish_reason": finish}]}


def _other(request: Record) -> tuple[int, bytes]:
    """Status and body for a path that is no completion."""
    body: Any
    match request.path.rpartition("/")[2]:
        case "models" if request.method == "GET":
            body = {
                "object": "list",
                "data": [{"id": each, "object": "model", "owned_by": "us"} for each in MODELS],
            }
        case "health" | "version" if request.method == "GET":
            body = {"status": "ok", "version": "1.0"}
        case "embeddings":
            body = _embeddings(request)
        case "rerank":
            count = len(request.json["documents"])
            results = [{"index": index, "relevance_score": 1 / (index + 1)} for index in range(count)]
            body = {"model": request.model, "results": results, "usage": {"total_tokens": count}}
        case _:
            return 404, json.dumps(error_body(f"no such path: {request.path}", "not_found")).encode()
    return 200, json.dumps(body).encode()


def _embeddings(request: Record) -> dict[str, Any]:
    given = request.json["input"]
    count = len(given) if isinstance(given, list) else 1
    data = [
        {"object": "embedding", "index": index, "embedding": [0.5, -0.25, 0.125]} for index in range(count)
    ]
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "model": request.model, "data": data, "usage": usage}
