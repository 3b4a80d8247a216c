"""Examples in the schema: made from the shapes themselves, with words that mean something for names that people know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jsonschema import Draft202012Validator

Schema = dict[str, Any]

MOMENT = "2026-01-31T12:00:00Z"
BY_NAME: Mapping[str, Any] = {
    "action": "add_server",
    "allowed_models": ["fast", "openai/*"],
    "allowed_networks": ["10.0.0.0/8"],
    "api_key": "sk-a-key-of-your-provider",
    "api_id": 13,
    "base_url": "http://localhost:11434",
    "capabilities": ["tools"],
    "changes": {"name": [None, "Box"]},
    "custom_headers": {"X-Team": "search"},
    "details": {"base_url": ["This is not the address of a server."]},
    "amount_usd": 200,
    "entity_name": "Box",
    "expires_in": 300,
    "entity_type": "ai_server",
    "fingerprint": "4f0c5f1d2a3b4c5d6e7f8091",
    "id": "llama3.2",
    "hash": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "ids": [13, 14],
    "ip": "10.0.0.7",
    "kind": "ollama",
    "key": "pen_live_0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdef_0aB1cD",
    "key_name": "team",
    "last4": "1cD",
    "masked_key": "****cdef",
    "metadata": {"rack": "7"},
    "mode": "auto",
    "model": "llama3.2",
    "models": ["llama3.2"],
    "name": "Box",
    "next": "http://127.0.0.1:8000/api/v1/servers?page=2",
    "overlap_seconds": 3600,
    "owner": "alice",
    "password": "correct horse battery",
    "prefix": "pen_live_0123456789",
    "previous": None,
    "provider": "openai",
    "provider_id": 13,
    "provider_name": "Box",
    "provider_type": "ai_server",
    "purpose": "chat",
    "purposes": ["chat"],
    "priority": 10,
    "weight": 2,
    "context_window": 131072,
    "refresh": "eyJ...",
    "request_id": "0f7c2a51d1d94c4cb7c1f0a8f1b8a6de",
    "server_type": "ollama",
    "slug": "box",
    "status": "online",
    "strategy": "round-robin",
    "user": "alice",
    "username": "alice",
    "why": ["route fast: auto, round-robin", "box/llama3.2: its turn"],
}
BY_FORMAT: Mapping[str, Any] = {
    "date-time": MOMENT,
    "date": MOMENT[:10],
    "uuid": "0199f5a0-7b1c-7e3a-9d53-3c6f8f0e1a2b",
    "uri": "https://gateway.example.org/api/v1/servers?page=2",
    "ipv4": "10.0.0.7",
    "ipv6": "fd00::7",
    "email": "alice@example.com",
    "double": 0.5,
    "decimal": "0.5",
}
SENT = frozenset(
    {
        "kind",
        "base_url",
        "models",
        "nodes",
        "purpose",
        "fallbacks",
        "provider_id",
        "api_key",
        "is_healthy",
        "model",
        "user",
    }
)
"""What a request's example shows beyond what is required."""
PATCHED = ("amount_usd", "priority", "weight", "context_window", "model", "strategy", "name", "is_healthy")
"""What the example of a partial change changes: the first of these that there is."""
LEFT_OUT = frozenset({"otp"})


def with_examples(result: Schema, generator: Any, request: Any, public: bool) -> Schema:
    """Give each JSON body of each operation an example, unless it has one."""
    schemas = result["components"].get("schemas", {})
    for path in result["paths"].values():
        for operation in path.values():
            bodies = [(operation.get("requestBody", {}), True)]
            bodies += [(answer, False) for answer in operation.get("responses", {}).values()]
            for body, sent in bodies:
                content = body.get("content", {}).get("application/json")
                if content is not None and not {"example", "examples"} & content.keys():
                    content["example"] = example(content["schema"], schemas, sent=sent)
    return result


def example(
    schema: Schema, schemas: Mapping[str, Schema], *, sent: bool, name: str = "", depth: int = 0
) -> Any:
    """A value of this shape. sent: without what is read-only, and of the rest what one writes; else without what is write-only."""
    schema = resolved(schema, schemas)
    if name in BY_NAME and fits(BY_NAME[name], schema, schemas):
        return BY_NAME[name]
    for word in ("example", "const", "default"):
        if word in schema and fits(schema[word], schema, schemas):
            return schema[word]
    if choices := schema.get("enum"):
        return choices[0]
    if parts := [part for word in ("allOf", "oneOf", "anyOf") for part in schema.get(word, ())]:
        return example(parts[0], schemas, sent=sent, name=name, depth=depth)
    kinds = schema.get("type", "object")
    kind = kinds if isinstance(kinds, str) else next((kind for kind in kinds if kind != "null"), "null")
    if kind == "object":
        return _object(schema, schemas, sent=sent, depth=depth)
    if kind == "array":
        return [example(schema.get("items", {}), schemas, sent=sent, name=name, depth=depth + 1)]
    return _plain(kind, schema, name)


def _object(schema: Schema, schemas: Mapping[str, Schema], *, sent: bool, depth: int) -> dict[str, Any]:
    if depth > 6:
        return {}
    hidden, required = "readOnly" if sent else "writeOnly", schema.get("required", ())
    shapes = {
        name: shape
        for name, shape in schema.get("properties", {}).items()
        if not resolved(shape, schemas).get(hidden) and not shape.get(hidden) and name not in LEFT_OUT
    }
    if sent:
        wanted = [name for name in shapes if name in required or name in SENT]
        if not required and depth == 0:
            wanted = [name for name in PATCHED if name in shapes][:1] or wanted or list(shapes)[:1]
        shapes = {name: shapes[name] for name in wanted}
    return {
        name: example(shape, schemas, sent=sent, name=name, depth=depth + 1) for name, shape in shapes.items()
    }


def _plain(kind: str, schema: Schema, name: str) -> Any:
    if kind == "string":
        return BY_FORMAT.get(schema.get("format", ""), name or "text")
    if kind in {"integer", "number"}:
        return max(schema.get("minimum", 1), min(1, schema.get("maximum", 1)))
    return True if kind == "boolean" else None


def resolved(schema: Schema, schemas: Mapping[str, Schema]) -> Schema:
    while "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    return schema


def fits(value: Any, schema: Schema, schemas: Mapping[str, Schema]) -> bool:
    """Whether a value has this shape, as JSON Schema 2020-12 (which OpenAPI 3.1 uses) sees it."""
    whole = {**schema, "components": {"schemas": schemas}}
    return bool(Draft202012Validator(whole).is_valid(value))
