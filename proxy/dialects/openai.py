"""The OpenAI dialect on our side: what a chat request may be, and how answers and errors look. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import orjson

from proxy.errors import InvalidRequest

DONE = b"data: [DONE]\n\n"
OURS = ("provider_id",)
ABSENT = ("", "auto", "default")

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "invalid_request_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}


class ChatRequest(NamedTuple):
    """A chat completion as asked for. `body` is what goes upstream, without our own fields."""

    body: Mapping[str, Any]
    model: str
    provider_id: str
    stream: bool
    wants_usage: bool


def chat_request(body: Any) -> ChatRequest:
    """Check what we rely on, and leave the rest to the provider. Raises InvalidRequest with the field that is wrong."""
    if not isinstance(body, dict):
        raise InvalidRequest("The body is not a JSON object.")
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages is a list of at least one message.", param="messages")
    if not all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages):
        raise InvalidRequest("Each message is an object with a role.", param="messages")
    model = _text(body, "model")
    stream = body.get("stream")
    if stream is not None and not isinstance(stream, bool):
        raise InvalidRequest("stream is true or false.", param="stream")
    options = body.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise InvalidRequest("stream_options is an object.", param="stream_options")
    return ChatRequest(
        body={name: value for name, value in body.items() if name not in OURS},
        model="" if model in ABSENT else model,
        provider_id=_identifier(body),
        stream=bool(stream),
        wants_usage=bool(options and options.get("include_usage")),
    )


def _text(body: Mapping[str, Any], name: str) -> str:
    value = body.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > 512:
        raise InvalidRequest(f"{name} is a text of at most 512 characters.", param=name)
    return value


def _identifier(body: Mapping[str, Any]) -> str:
    value = body.get("provider_id")
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return _text(body, "provider_id")


def error(status: int, code: str, message: str, request_id: str, param: str | None = None) -> bytes:
    """The body of an error answer."""
    return orjson.dumps(
        {
            "error": {
                "message": message,
                "type": TYPES.get(status, "server_error"),
                "param": param,
                "code": code,
            },
            "request_id": request_id,
        }
    )


def error_event(status: int, code: str, message: str, request_id: str) -> bytes:
    """The last event of a stream that broke."""
    return b"data: " + error(status, code, message, request_id) + b"\n\n"


def model(id: str, owner: str) -> dict[str, Any]:
    """`created` is not known of models that others run; clients want the field."""
    return {"id": id, "object": "model", "created": 0, "owned_by": owner}


def model_list(models: Iterable[dict[str, Any]]) -> bytes:
    return orjson.dumps({"object": "list", "data": list(models)})


def dumps(value: Mapping[str, Any]) -> bytes:
    return orjson.dumps(value)
