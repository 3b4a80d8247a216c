"""vLLM: OpenAI's dialect; `GET /health` is an empty 200, or 503 when the engine is dead."""

from __future__ import annotations

from functools import partial

from providers.adapters import openai
from providers.adapters.addresses import native_root, self_hosted_api
from providers.adapters.failures import classify
from providers.wire import Answer, Kind, Reading


def read_health(answer: Answer) -> Reading:
    return openai.refusal(answer) or Reading("online", answer.status)


KIND = Kind(
    name="vllm",
    label="vLLM",
    self_hosted=True,
    base_url="http://localhost:8000",
    authorize=openai.bearer,
    classify=classify,
    chat=openai.chat(
        self_hosted_api,
        # https://docs.vllm.ai/en/latest/serving/openai_compatible_server.html: both belong together.
        prefill=partial(openai.prefilled, continue_final_message=True, add_generation_prompt=False),
    ),
    models=openai.models(self_hosted_api),
    probe=openai.probe(lambda endpoint: f"{native_root(endpoint)}/health", read_health),
)
