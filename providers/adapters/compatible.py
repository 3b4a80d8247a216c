"""Anything else that speaks OpenAI's dialect: LM Studio, SGLang, TGI, LocalAI, another gateway."""

from __future__ import annotations

from providers.adapters import openai
from providers.adapters.addresses import self_hosted_api
from providers.adapters.failures import classify
from providers.wire import Kind

KIND = Kind(
    name="openai-compatible",
    label="OpenAI-compatible server",
    self_hosted=True,
    base_url="http://localhost:8000/v1",
    authorize=openai.bearer,
    classify=classify,
    chat=openai.chat(self_hosted_api),
    models=openai.models(self_hosted_api),
    probe=openai.probe(lambda endpoint: f"{self_hosted_api(endpoint)}/models", openai.read_listing),
)
