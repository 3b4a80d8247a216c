"""What a request needs of a model, and what is known of models: who could not answer is not asked. Pure.

What is not known of a model is never held against it, and estimates are generous: a refusal of ours has to be right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

BYTES_PER_TOKEN = 4
MARGIN = 0.5
"""How much of the estimate must be above a window before the request certainly does not fit: 8 bytes for each token."""

WORDS: Final[Mapping[str, frozenset[str]]] = {
    "tools": frozenset({"tools", "tool_use", "tool_calling", "function_calling", "supports_tools"}),
    "vision": frozenset({"vision", "image", "images", "image_input", "multimodal", "supports_image_input"}),
    "json_schema": frozenset({"json_schema", "structured_outputs", "structured_output"}),
}
"""An ability to the words that providers and people have for it."""

MENTIONS: Final[Mapping[str, frozenset[str]]] = {
    "tools": WORDS["tools"] | WORDS["vision"],
    "vision": WORDS["tools"] | WORDS["vision"],
    "json_schema": WORDS["json_schema"] | {"json", "json_mode", "json_object"},
}
"""A list with none of these words (`["chat"]`) does not speak of the ability at all, so nothing follows from it."""

NAMES: Final[Mapping[str, str]] = {"tools": "tools", "vision": "images", "json_schema": "a JSON schema"}


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a model. context_window in tokens; nothing known is None or empty."""

    context_window: int | None = None
    dimensions: int | None = None
    capabilities: frozenset[str] = frozenset()
    purposes: frozenset[str] = frozenset()


UNKNOWN = ModelFacts()


class Needs(NamedTuple):
    """What a request needs. prompt_bytes: of its texts in UTF-8, without images. max_tokens: 0 when it sets no limit."""

    prompt_bytes: int = 0
    max_tokens: int = 0
    tools: bool = False
    vision: bool = False
    json_schema: bool = False

    @property
    def tokens(self) -> int:
        """An estimate of the window that prompt and answer take together."""
        return self.prompt_bytes // BYTES_PER_TOKEN + self.max_tokens


NOTHING = Needs()


class Misfit(NamedTuple):
    """Why a model cannot take a request. `what`: window, or the ability that it lacks."""

    what: Literal["window", "tools", "vision", "json_schema"]
    text: str


def misfit(facts: ModelFacts, needs: Needs) -> Misfit | None:
    """What keeps this model from taking the request, if it certainly cannot.

    Only the prompt is held against the window: servers shorten an answer that would not fit, and many mean to.
    """
    least = int(needs.prompt_bytes / BYTES_PER_TOKEN * MARGIN)
    if facts.context_window is not None and least > facts.context_window:
        return Misfit("window", f"at least {least} tokens, and its window has {facts.context_window}")
    if needs.tools and _lacks(facts, "tools"):
        return Misfit("tools", "it takes no tools")
    if needs.vision and _lacks(facts, "vision"):
        return Misfit("vision", "it takes no images")
    if needs.json_schema and _lacks(facts, "json_schema"):
        return Misfit("json_schema", "it takes no JSON schema")
    return None


def _lacks(facts: ModelFacts, ability: str) -> bool:
    known = facts.capabilities
    return bool(known & MENTIONS[ability]) and not known & WORDS[ability]


def same_dimensions(model: str, facts: ModelFacts, other: str, other_facts: ModelFacts) -> bool:
    """Whether `other` may embed in place of `model`: vectors of another length cannot be compared with those stored.

    Where a length is not known, only the model of the same name is trusted to have the same.
    """
    if facts.dimensions is None or other_facts.dimensions is None:
        return model == other
    return facts.dimensions == other_facts.dimensions


def needs_of(body: Mapping[str, Any]) -> Needs:
    """What a chat completion's body asks for. It may hold anything; what is not understood needs nothing."""
    size, images = 0, False
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        content = message.get("content") if isinstance(message, dict) else None
        for part in content if isinstance(content, list) else (content,):
            if isinstance(part, dict):
                images = images or part.get("type") in {"image_url", "input_image", "image"}
                part = part.get("text")  # noqa: PLW2901  # the text of the part is what counts from here on
            size += _size(part)
    return Needs(
        prompt_bytes=size,
        max_tokens=completion_limit(body),
        tools=bool(body.get("tools") or body.get("functions")),
        vision=images,
        json_schema=_is_schema(body.get("response_format")),
    )


def _size(text: Any) -> int:
    if not isinstance(text, str):
        return 0
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def completion_limit(body: Mapping[str, Any]) -> int:
    """The completion tokens that a request asks for at most; 0 when it does not say.

    Both names are passed on, and servers differ in which of them they heed, so the larger one counts.
    """
    return max(_whole(body.get("max_completion_tokens")), _whole(body.get("max_tokens")))


def choices(body: Mapping[str, Any]) -> int:
    """How many answers a request asks for."""
    return max(1, _whole(body.get("n")))


def _whole(number: Any) -> int:
    """0 for what is no whole number above 0. Servers take 200.0 for 200, and some take "200"."""
    if type(number) is str and len(number) < 20 and number.strip().isdecimal():
        number = int(number)
    if type(number) is float and number.is_integer():
        number = int(number)
    return number if type(number) is int and number > 0 else 0


def _is_schema(value: Any) -> bool:
    return isinstance(value, dict) and value.get("type") == "json_schema"
