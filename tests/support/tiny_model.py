"""A language model of 600 KB with random weights, written on the spot: real inference, meaningless words.

The vocabulary is the smallest that the llama.cpp server accepts for chat: control tokens, the 256 bytes as a fallback (so
every text can be read), single characters, common words, and two markers between which a tool call stands.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WIDTH, LAYERS, HEADS, INNER, CONTEXT = 64, 2, 4, 128, 4096
CONTROL = ("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>")
TOOL_MARKERS = ("<tool_call>", "</tool_call>")
SPACE = "\u2581"  # how this kind of vocabulary writes a space
CHARACTERS = (
    SPACE
    + "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;!?'\"()[]{}<>/\\-_+=*&^%$#@|`~\n"
)
WORDS = (
    "water river gate valve wheel stone mill flow pipe level spring bridge north south rain cloud field grass green "
    "light night day morning summer winter road house door window table paper letter number word voice song hand foot "
    "head heart bread salt apple horse bird fish sand wind fire cold warm slow quick first last more less under over "
    "between before after always never often here there where when because without against"
)
CHAT_TEMPLATE = """\
{%- if tools -%}
<|im_start|>system
These tools can be called; each line is the JSON schema of one:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one by writing <tool_call>{"name": NAME, "arguments": OBJECT}</tool_call>.<|im_end|>
{% endif -%}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


@dataclass
class Vocabulary:
    """Tokens with their kinds (the `gguf.TokenType` name) and scores (a longer word is preferred by a higher score)."""

    tokens: list[bytes] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def add(self, text: str, kind: str, score: float = 0.0) -> None:
        self.tokens.append(text.encode())
        self.kinds.append(kind)
        self.scores.append(score)

    def number(self, text: str) -> int:
        return self.tokens.index(text.encode())


def vocabulary() -> Vocabulary:
    made = Vocabulary()
    for text in CONTROL:
        made.add(text, "UNKNOWN" if text == "<unk>" else "CONTROL")
    for byte in range(256):
        made.add(f"<0x{byte:02X}>", "BYTE")
    for character in CHARACTERS:
        made.add(character, "NORMAL", -1000.0)
    # Every beginning of a word is a token too: the tokenizer reaches a word by joining two neighbours at a time.
    beginnings = [f"{SPACE}{word}"[:end] for word in WORDS.split() for end in range(2, len(word) + 2)]
    for rank, beginning in enumerate(dict.fromkeys(beginnings), start=1):
        made.add(beginning, "NORMAL", -float(rank))
    for text in TOOL_MARKERS:
        made.add(text, "USER_DEFINED")
    return made


def must_call_a_tool() -> dict[str, Any]:
    """What a chat request must carry, beside its tools, so that this model calls one: it would rarely stop by itself."""
    words = vocabulary()
    bias = {str(words.number("<tool_call>")): 30, str(words.number("<|im_end|>")): 45}
    return {"tool_choice": "required", "logit_bias": bias}


def write(path: Path, *, seed: int = 0) -> Path:
    """Write the model as a GGUF file; the same seed gives the same file."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    _write_shape(writer, gguf.LlamaFileType.ALL_F32)
    _write_tokenizer(writer, vocabulary(), {kind.name: int(kind) for kind in gguf.TokenType})
    _write_weights(writer, len(vocabulary().tokens), seed)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write_shape(writer: Any, file_type: int) -> None:
    writer.add_name("tiny-random-llama")
    writer.add_file_type(file_type)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)


def _write_tokenizer(writer: Any, words: Vocabulary, kinds: dict[str, int]) -> None:
    writer.add_vocab_size(len(words.tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words.tokens)
    writer.add_token_scores(words.scores)
    writer.add_token_types([kinds[kind] for kind in words.kinds])
    writer.add_unk_token_id(words.number("<unk>"))
    writer.add_bos_token_id(words.number("<s>"))
    writer.add_eos_token_id(words.number("</s>"))
    writer.add_eot_token_id(words.number("<|im_end|>"))
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_weights(writer: Any, size: int, seed: int) -> None:
    import numpy as np

    random = np.random.default_rng(seed)

    def normal(spread: float, *shape: int) -> Any:
        return random.normal(0, spread, shape).astype(np.float32)

    head = normal(1.2, size, WIDTH)
    head[: len(CONTROL) + 256] *= (
        0.05  # control tokens and single bytes become unlikely, so that answers are words
    )
    writer.add_tensor("token_embd.weight", normal(1, size, WIDTH))
    writer.add_tensor("output.weight", head)
    writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
    for block in (f"blk.{layer}." for layer in range(LAYERS)):
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"{block}{name}.weight", np.ones(WIDTH, np.float32))
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}{name}.weight", normal(0.08, WIDTH, WIDTH))
        for name in ("ffn_gate", "ffn_up"):
            writer.add_tensor(f"{block}{name}.weight", normal(0.08, INNER, WIDTH))
        writer.add_tensor(f"{block}ffn_down.weight", normal(0.08, WIDTH, INNER))
