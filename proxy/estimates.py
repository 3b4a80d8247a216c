"""How many tokens a prompt or an answer has, where the provider did not say: an estimate, in bounded time. Pure.

Texts are counted by their shapes (words, numbers, signs, scripts without spaces), with weights fitted to OpenAI's o200k_base: within
an eighth for code and for prose in Latin letters, Chinese and Japanese, a quarter for most of the rest. Vocabularies differ from each other by as much. A tokenizer would be exact
for one of them; what that costs is in docs/adr/0015-tokens-are-estimated.md.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from providers.adapters.json_values import mapping, parse_object

SLICES, SLICE_CHARS = 32, 128
"""Of texts that are longer than all slices together so many are counted, spread over them, and the rest is taken to be alike."""
MAX_MESSAGES, MAX_PARTS, MAX_TOOLS, MAX_WORDS = 256, 16, 32, 64
"""Messages, parts of a message, tools and words of a tool that are looked at; of more, every second, third and so on."""

PER_MESSAGE, PER_NAME, PRIMING = 3, 1, 3
"""What OpenAI adds for each message, for its name, and for the beginning of the answer
(https://cookbook.openai.com/examples/how_to_count_tokens_with_tiktoken)."""
PER_TOOL = 19
"""What it adds for each function: 7 where it begins, 12 where it ends (same source)."""
IMAGE, SMALL_IMAGE, AUDIO, FILE = 765, 85, 600, 2000
"""For what cannot be counted without looking into it: an image of 1024 x 1024 pixels, one with `detail: low`, a minute of sound,
a file of a few pages."""
FLAT = {"image_url": IMAGE, "input_audio": AUDIO, "file": FILE}

LONG_EVENT_BYTES = 8
"""Of text in an event, on average, above which there is more than one token in each."""
BYTES_PER_TOKEN = 4.5
"""Of the text of such answers."""

_WORD = re.compile("[A-Z]?[a-z\u00aa-\u036f]+")
_CAPITALS = re.compile("[A-Z]{1,3}(?![a-z\u00aa-\u036f])")
_FOREIGN = re.compile("[\u0370-\u1fff\u2c00-\u2dff]+")
_DENSE = re.compile("[\u2e80-\uabff\uac00-\ufaff\U00020000-\U0003ffff]")
_NUMBER = re.compile("[0-9]{1,3}")
_SIGNS = re.compile(r"[!-/:-@\[-^`{-~\u00a1-\u00a9\u2010-\u2bff]{1,3}|_")
_BREAK = re.compile(r"\n\s*|[ \t]{2,}")
_PICTURE = re.compile("[\U0001f000-\U0001faff]")


def of_request(body: Mapping[str, Any]) -> int:
    """The prompt of a chat request that was checked (`dialects.openai.chat_request`): texts, tools, and what goes with them."""
    found = _Found()
    messages, share = _some(body["messages"], MAX_MESSAGES)
    for message in messages:
        found.flat += PER_MESSAGE * share
        _take_message(mapping(message), share, found)
    tools, share = _some(body.get("tools"), MAX_TOOLS)
    for tool in tools:
        found.flat += PER_TOOL * share
        _take_words(tool, share, found)
    return PRIMING + found.tokens()


def of_answer(body: bytes) -> int:
    """A whole chat completion that says nothing about its usage."""
    found = _Found()
    choices, share = _some(parse_object(body).get("choices"), MAX_MESSAGES)
    for choice in choices:
        _take_message(mapping(mapping(choice).get("message")), share, found)
    return found.tokens()


def of_stream(events: int, text_bytes: int) -> int:
    """What was forwarded of a stream: most providers send a token in each event, and what some put together is told by its size."""
    return events if text_bytes <= LONG_EVENT_BYTES * events else round(text_bytes / BYTES_PER_TOKEN)


def of_text(text: str) -> int:
    """About how many tokens `text` has. All of it is read."""
    words = sum([1 + max(0, len(word) - 4) // 7 for word in _WORD.findall(text)])
    words += sum([1 + max(0, len(word) - 1) // 5 for word in _FOREIGN.findall(text)])
    short = sum([len(each.findall(text)) for each in (_CAPITALS, _NUMBER, _SIGNS, _BREAK)])
    return round(words + short + 0.7 * len(_DENSE.findall(text)) + 1.5 * len(_PICTURE.findall(text)))


class _Found:
    """texts: some of those there are. chars: of all that they stand for. flat: tokens that are no text."""

    __slots__ = ("chars", "flat", "texts")

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.chars = self.flat = 0.0

    def add(self, text: Any, share: float) -> None:
        """A text that stands for `share` of its length; what is no text is left out."""
        if isinstance(text, str):
            self.texts.append(text)
            self.chars += share * len(text)

    def tokens(self) -> int:
        sample = " ".join(self._slices())
        return round(self.flat + (of_text(sample) * self.chars / len(sample) if sample else 0))

    def _slices(self) -> Iterator[str]:
        total = sum(map(len, self.texts))
        if total <= SLICES * SLICE_CHARS:
            yield from self.texts
            return
        place, offset = 0.0, 0
        for text in self.texts:
            while place < offset + len(text):
                start = int(place) - offset
                yield text[start : start + SLICE_CHARS]
                place += total / SLICES
            offset += len(text)


def _some(items: Any, most: int) -> tuple[Sequence[Any], float]:
    """At most `most` of a list, and how many each of them stands for; none of what is no list."""
    if not isinstance(items, list) or not items:
        return (), 1.0
    some = items[:: -(-len(items) // most)]
    return some, len(items) / len(some)


def _take_message(message: Mapping[str, Any], share: float, found: _Found) -> None:
    found.flat += PER_NAME * share if message.get("name") else 0
    for name in ("role", "name", "content", "reasoning_content", "refusal"):
        found.add(message.get(name), share)
    parts, each = _some(message.get("content"), MAX_PARTS)
    for part in map(mapping, parts):
        found.add(part.get("text"), share * each)
        found.flat += _flat(part) * share * each
    calls, each = _some(message.get("tool_calls"), MAX_PARTS)
    for call in calls:
        _take_words(mapping(call).get("function"), share * each, found)


def _flat(part: Mapping[str, Any]) -> int:
    if mapping(part.get("image_url")).get("detail") == "low":
        return SMALL_IMAGE
    return FLAT.get(str(part.get("type")), 0)


def _take_words(value: Any, share: float, found: _Found) -> None:
    """The names and texts in a JSON value, and a token for what stands around each of them."""
    stack, left = [value], MAX_WORDS
    while stack and left:
        item = stack.pop()
        if isinstance(item, str):
            left -= 1
            found.flat += share
            found.add(item, share)
        elif isinstance(item, dict):
            for name, inner in islice(item.items(), left):
                stack += (inner, name)
        elif isinstance(item, list):
            stack += item[:left]
