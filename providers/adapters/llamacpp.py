"""llama.cpp's server: OpenAI's dialect; `GET /health` is 503 while the model loads, `/v1/models` is 200 even then.

Source: https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from providers.adapters import openai
from providers.adapters.addresses import native_root, self_hosted_api
from providers.adapters.failures import classify
from providers.adapters.json_values import mapping, parse_object, size, text
from providers.wire import Answer, Kind, Model, Models, Reading, WireRequest


def read_health(answer: Answer) -> Reading:
    if answer.status == 503:
        return Reading("degraded", 503, "loading the model")
    return openai.read_any_object(answer)


def read_models(body: bytes) -> tuple[Model, ...]:
    """The window is what the model was trained for (`meta.n_ctx_train`), or less, where the server tells its own (`n_ctx`)."""
    rows = parse_object(body).get("data")
    metas = (
        {text(mapping(row).get("id")): mapping(row).get("meta") for row in rows}
        if isinstance(rows, list)
        else {}
    )
    return tuple(_with_window(model, mapping(metas.get(model.id))) for model in openai.read_models("", body))


def _with_window(model: Model, meta: Mapping[str, Any]) -> Model:
    window = size(meta.get("n_ctx")) or size(meta.get("n_ctx_train"))
    return replace(model, context_window=window or model.context_window)


KIND = Kind(
    name="llamacpp",
    label="llama.cpp",
    self_hosted=True,
    base_url="http://localhost:8080",
    authorize=openai.bearer,
    classify=classify,
    # An assistant's message that comes last is gone on with.
    chat=openai.chat(self_hosted_api, prefill=openai.prefilled),
    models=Models(
        request=lambda endpoint: WireRequest("GET", f"{self_hosted_api(endpoint)}/models"), parse=read_models
    ),
    probe=openai.probe(lambda endpoint: f"{native_root(endpoint)}/health", read_health),
)
