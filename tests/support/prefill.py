"""Upstreams that go on with an answer that somebody else began, each in the way of its kind, and one that will not."""

from __future__ import annotations

import re
from typing import Any

from tests.support.answers import Answer, ok, status, words
from tests.support.http_server import Behaviour, Exchange

LONG = Answer(texts=words(60))
_PIECE = re.compile(r"\s*\S+(?:\s+$)?")


def prefill_of(body: Any) -> str | None:
    """The beginning of an answer that a request asks to go on with, in any of the ways; None when it asks for a new one."""
    last = body["messages"][-1]
    return str(last["content"]) if last["role"] == "assistant" else None


def asks_as(kind: str, body: Any) -> bool:
    """Whether this request asks for a continuation in the words of this kind of provider."""
    last = body["messages"][-1]
    if last["role"] != "assistant":
        return False
    if kind == "vllm":
        return bool(body.get("continue_final_message") is True and body.get("add_generation_prompt") is False)
    if kind in {"mistral", "deepseek"}:
        return bool(last.get("prefix") is True)
    return kind == "llamacpp" and "continue_final_message" not in body and "prefix" not in last


def continuing(answer: Answer = LONG) -> Behaviour:
    """A model with one answer in it: asked for a new one it gives all of it, asked to go on it gives the rest.

    As real ones do, it begins the rest with the blank that belongs before the next word.
    """

    async def behave(exchange: Exchange) -> None:
        begun = prefill_of(exchange.request.json)
        if begun is None:
            await ok(answer)(exchange)
            return
        if not answer.text.startswith(begun) or begun != begun.rstrip():
            await status(400, message="the last message is no beginning of mine")(exchange)
            return
        rest = tuple(_PIECE.findall(answer.text[len(begun) :]))
        await ok(answer, texts=rest)(exchange)

    return behave


def refusing(answer: Answer = LONG) -> Behaviour:
    """A server that takes no prefill: asked to go on it answers 400, asked for a new answer it gives all of it."""

    async def behave(exchange: Exchange) -> None:
        if prefill_of(exchange.request.json) is None:
            await ok(answer)(exchange)
        else:
            await status(400, message="PREFILL-REFUSED: the final message must be from the user")(exchange)

    return behave
