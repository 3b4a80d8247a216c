"""The schema's last touches: one mount of several, no trailing slashes, and the data plane's paths."""

from __future__ import annotations

from typing import Any

from drf_spectacular.extensions import OpenApiAuthenticationExtension
from drf_spectacular.openapi import AutoSchema

Endpoint = tuple[str, str, str, Any]
Schema = dict[str, Any]

DATA_PLANE = "data plane"
ERROR = "#/components/schemas/Error"
DATA_ERROR = "#/components/schemas/DataPlaneError"
IF_MATCH = {
    "name": "If-Match",
    "in": "header",
    "schema": {"type": "string"},
    "description": "The ETag that was read; when the row has changed since, the answer is 412.",
}
STATUSES = {
    "400": "The request is not valid.",
    "401": "Nobody is logged in.",
    "403": "The caller's role does not allow it.",
    "404": "There is no such thing.",
    "409": "It is in use, or conflicts with the present state.",
    "412": "It has changed since it was read.",
    "413": "The body is too large.",
    "415": "The body is no JSON.",
    "429": "Too many requests.",
    "502": "The provider does not answer as it should.",
    "503": "It cannot be done now.",
}


class NamedSchema(AutoSchema):
    """Operations are named after the path and what the view calls them: `servers_test`, and not `servers_test_create`."""

    def get_operation_id(self) -> str:
        action = getattr(self.view, "action", None)
        known = {"list", "retrieve", "create", "update", "partial_update", "destroy", None}
        if action in known:
            return str(super().get_operation_id())
        collection = self.path.removeprefix("/api/v1/").partition("/")[0].replace("-", "_")
        return f"{collection}_{action}"


class BearerScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """Tells the schema how `audit.api.BearerAuthentication` is used."""

    target_class = "audit.api.BearerAuthentication"
    name = "token"

    def get_security_definition(self, auto_schema: Any) -> Schema:
        return {
            "type": "http",
            "scheme": "bearer",
            "bearerFormat": "JWT",
            "description": "The access token of /api/v1/auth/token.",
        }


class SessionScheme(OpenApiAuthenticationExtension):  # type: ignore[no-untyped-call]
    """The session cookie by the name it has over plain http, so that the schema is the same everywhere."""

    target_class = "rest_framework.authentication.SessionAuthentication"
    name = "cookieAuth"
    priority = 1

    def get_security_definition(self, auto_schema: Any) -> Schema:
        return {
            "type": "apiKey",
            "in": "cookie",
            "name": "penstock_session",
            "description": "Set by logging in at /admin/login/; over https it is called `__Host-session`.",
        }


def only_v1(endpoints: list[Endpoint], **kwargs: Any) -> list[Endpoint]:
    """The paths under /api/v1, written without a trailing slash; the other mounts are the same paths again."""
    return [
        (path.rstrip("/"), regex, method, callback)
        for path, regex, method, callback in endpoints
        if path.startswith("/api/v1/")
        and not path.startswith("/api/v1/llm-config/")
        and "/schema" not in path
    ]


def with_errors(result: Schema, generator: Any, request: Any, public: bool) -> Schema:
    """Every operation names the one shape of errors."""
    result["components"].setdefault("schemas", {})["Error"] = _error_schema()
    for path in result["paths"].values():
        for method, operation in path.items():
            for status in _statuses(method, operation):
                operation["responses"].setdefault(status, _refers(STATUSES[status], ERROR))
            if "412" in operation["responses"]:
                operation.setdefault("parameters", []).append(IF_MATCH)
    return result


def _statuses(method: str, operation: Schema) -> list[str]:
    if "health" in operation.get("tags", ()):
        return []
    named = ["401", "403", "429"] if operation.get("security") != [{}] else ["401", "429"]
    named.append("503")
    parameters = operation.get("parameters", ())
    if any(parameter["in"] == "path" or parameter["name"] == "page" for parameter in parameters):
        named.append("404")
    asks = any(parameter["in"] == "query" for parameter in operation.get("parameters", ()))
    if asks or method in {"post", "put", "patch"}:
        named.append("400")
    if method in {"post", "put", "patch"}:
        named += ["409", "413", "415"]
    if method in {"put", "patch", "delete"} or operation["operationId"].endswith(("_rotate", "_revoke")):
        named += ["409", "412"]
    if operation["operationId"].endswith(("_models", "_refresh")):
        named.append("502")
    return sorted(set(named))


def _error_schema() -> Schema:
    details = {"type": "object", "additionalProperties": True, "description": "For 400: field -> messages."}
    error = {
        "type": "object",
        "properties": {"code": {"type": "string"}, "message": {"type": "string"}, "details": details},
        "required": ["code", "message", "details"],
    }
    return {
        "type": "object",
        "properties": {"error": error, "request_id": {"type": "string"}},
        "required": ["error", "request_id"],
    }


def with_types_once(result: Schema, generator: Any, request: Any, public: bool) -> Schema:
    """drf-spectacular adds "null" to the type of a field that may be null even where it is there already."""
    parts: list[Any] = [result]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            if isinstance(part.get("type"), list):
                part["type"] = list(dict.fromkeys(part["type"]))
            parts.extend(part.values())
        elif isinstance(part, list):
            parts.extend(part)
    return result


def with_data_plane(result: Schema, generator: Any, request: Any, public: bool) -> Schema:
    """What applications call, with a gateway key. The bodies are OpenAI's, passed on with fields of ours."""
    components = result["components"]
    components.setdefault("schemas", {})["DataPlaneError"] = _data_error_schema()
    components.setdefault("securitySchemes", {})["gatewayKey"] = {
        "type": "http",
        "scheme": "bearer",
        "bearerFormat": "pen_live_...",
        "description": "A gateway key; also accepted in x-api-key, api-key or x-goog-api-key.",
    }
    result["paths"] = {**result["paths"], **_data_plane_paths()}
    return result


def _data_plane_paths() -> dict[str, Schema]:
    body = {
        "type": "object",
        "additionalProperties": True,
        "properties": {
            "model": {
                "type": "string",
                "description": "A model route, a model, <provider slug>/<model>, or auto.",
            },
            "provider_id": {"type": ["integer", "string"], "description": "The id or slug of a provider."},
            "messages": {"type": "array", "items": {"type": "object", "additionalProperties": True}},
            "stream": {"type": "boolean", "default": False},
        },
        "required": ["messages"],
    }
    chat = _operation("Complete a chat", "chat_completions", {"type": "object", "additionalProperties": True})
    chat["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    chat["responses"]["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    listing = {
        "type": "object",
        "properties": {"object": {"const": "list"}, "data": {"type": "array", "items": {"type": "object"}}},
        "required": ["object", "data"],
    }
    model = _operation("One model", "models_one", {"type": "object", "additionalProperties": True})
    model["parameters"] = [{"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "/v1/chat/completions": {"post": chat},
        "/v1/models": {"get": _operation("What this key may call", "models_all", listing)},
        "/v1/models/{id}": {"get": model},
    }


def _operation(summary: str, name: str, answer: Schema) -> Schema:
    return {
        "operationId": f"data_plane_{name}",
        "summary": summary,
        "tags": [DATA_PLANE],
        "security": [{"gatewayKey": []}],
        "responses": {
            "200": {"description": "OK", "content": {"application/json": {"schema": answer}}},
            "default": _refers("An error in OpenAI's shape.", DATA_ERROR),
        },
    }


def _data_error_schema() -> Schema:
    text = {"type": ["string", "null"]}
    error = {
        "type": "object",
        "properties": {"message": {"type": "string"}, "type": text, "param": text, "code": text},
        "required": ["message"],
    }
    return {
        "type": "object",
        "properties": {"error": error, "request_id": {"type": "string"}},
        "required": ["error"],
    }


def _refers(description: str, schema: str) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": {"$ref": schema}}}}
