"""Ollama: OpenAI's dialect for chat; its own `/api/version` and `/api/tags`, which load no model.

Source: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

from providers import errors
from providers.adapters import openai
from providers.adapters.addresses import native_root, self_hosted_api
from providers.adapters.failures import classify
from providers.adapters.json_values import mapping, parse_object, size, text
from providers.wire import Answer, Kind, Model, Models, Reading, WireRequest


def read_version(answer: Answer) -> Reading:
    reading = openai.read_any_object(answer)
    if reading.status != "online":
        return reading
    version = text(parse_object(answer.body).get("version"))
    if not version:
        return Reading("degraded", answer.status, "The answer is not Ollama's.")
    return Reading("online", answer.status, f"Ollama {version[:64]}")


def read_tags(body: bytes) -> tuple[Model, ...]:
    rows = parse_object(body).get("models")
    if not isinstance(rows, list):
        raise errors.ProtocolError(detail="there is no list of models")
    return tuple(model for row in rows if (model := _model(mapping(row))).id)


def _model(row: dict[str, object] | object) -> Model:
    fields = mapping(row)
    name = (text(fields.get("model")) or text(fields.get("name")))[:255]
    details = mapping(fields.get("details"))
    families = details.get("families")
    words = [word for word in families if isinstance(word, str)] if isinstance(families, list) else []
    # Every family of encoders that Ollama serves is there for embeddings.
    embeds = any("bert" in word for word in words)
    return Model(
        id=name,
        purposes=("embeddings",) if embeds else openai.guess_purposes(name),
        context_window=size(details.get("context_length")),
    )


KIND = Kind(
    name="ollama",
    label="Ollama",
    self_hosted=True,
    base_url="http://localhost:11434",
    authorize=openai.bearer,
    classify=classify,
    chat=openai.chat(self_hosted_api),
    models=Models(
        request=lambda endpoint: WireRequest("GET", f"{native_root(endpoint)}/api/tags"), parse=read_tags
    ),
    probe=openai.probe(lambda endpoint: f"{native_root(endpoint)}/api/version", read_version),
)
