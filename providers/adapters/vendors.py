"""The vendors: one line each, because all of them answer in OpenAI's dialect. What differs is in the line.

Sources of the addresses: each vendor's own page on its OpenAI-compatible API.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from providers.adapters import openai
from providers.adapters.addresses import vendor_api
from providers.adapters.failures import classify
from providers.wire import Chat, Endpoint, Headers, Kind, Models, Probe, WireRequest


def _line(
    name: str,
    label: str,
    base_url: str,
    *,
    chat: Chat | None = None,
    models: Models | None = None,
    probe: Probe | None = None,
) -> Kind:
    listing = models or openai.models(vendor_api)
    return Kind(
        name=name,
        label=label,
        self_hosted=False,
        base_url=base_url,
        authorize=openai.bearer,
        classify=classify,
        chat=chat or openai.chat(vendor_api),
        models=listing,
        # Listing models is free everywhere, and, where no line says otherwise, needs a valid key.
        probe=probe or Probe(request=listing.request, read=openai.read_listing),
        needs_key=True,
    )


def _anthropic_key(secret: str) -> Headers:
    return (("x-api-key", secret), ("anthropic-version", "2023-06-01"))


def _anthropic_models(endpoint: Endpoint) -> WireRequest:
    """The list is Anthropic's own and wants its own header; only chat takes a bearer token."""
    return WireRequest("GET", f"{vendor_api(endpoint)}/models?limit=1000", authorize=_anthropic_key)


def _cohere_models(endpoint: Endpoint) -> WireRequest:
    """The compatible API has no list; Cohere's own is beside it, on the same origin."""
    return WireRequest(
        "GET", f"{vendor_api(endpoint).removesuffix('/compatibility/v1')}/v1/models?page_size=1000"
    )


def _with_prefix(body: Mapping[str, Any], text: str) -> Mapping[str, Any]:
    """DeepSeek goes on with a last message that is marked so, under its `/beta`, and refuses it elsewhere. (Mistral takes the mark,
    too, but repeats the beginning in its answer, which nobody here takes off again.)"""
    return openai.prefilled(body, text, message={"prefix": True})


def _at(path: str) -> Callable[[Endpoint], str]:
    return lambda endpoint: f"{vendor_api(endpoint)}{path}"


VENDOR_KINDS: tuple[Kind, ...] = (
    _line("openai", "OpenAI", "https://api.openai.com/v1"),
    _line(
        "anthropic",
        "Anthropic",
        "https://api.anthropic.com/v1",
        models=replace(openai.models(vendor_api), request=_anthropic_models),
    ),
    _line(
        "google",
        "Google Gemini",
        "https://generativelanguage.googleapis.com/v1beta/openai",
        models=openai.models(vendor_api, prefix="models/"),
    ),
    _line(
        "cohere",
        "Cohere",
        "https://api.cohere.ai/compatibility/v1",
        models=replace(openai.models(vendor_api), request=_cohere_models),
    ),
    _line(
        "openrouter",
        "OpenRouter",
        "https://openrouter.ai/api/v1",
        # Anybody may list the models there, so the list says nothing about a key.
        probe=openai.probe(_at("/key"), openai.read_any_object),
    ),
    _line("together", "Together AI", "https://api.together.xyz/v1"),
    _line("fireworks", "Fireworks AI", "https://api.fireworks.ai/inference/v1"),
    _line("groq", "Groq", "https://api.groq.com/openai/v1"),
    # Mistral answers 422 to `stream_options`, and sends usage with the last chunk anyway.
    _line(
        "mistral",
        "Mistral AI",
        "https://api.mistral.ai/v1",
        chat=openai.chat(vendor_api, asks_usage=False),
    ),
    _line(
        "deepseek",
        "DeepSeek",
        "https://api.deepseek.com/v1",
        chat=openai.chat(vendor_api, prefill=_with_prefix),
    ),
    _line("zai", "Z.ai", "https://api.z.ai/api/paas/v4"),
    _line("huggingface", "Hugging Face", "https://router.huggingface.co/v1"),
)
