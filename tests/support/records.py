"""Records of the spool, as attempts leave them."""

from __future__ import annotations

from typing import Any

from proxy.spool import Final, Start


def a_start(key: str, **more: Any) -> Start:
    start: dict[str, Any] = {
        "id": key,
        "request_id": "req-1",
        "attempt": 1,
        "created_at": 1_790_000_000_123,
        "gateway_key_id": 7,
        "gateway_key": "shop",
        "owner": "",
        "route": "active:chat",
        "provider_id": 3,
        "provider": "local",
        "api_key_id": None,
        "requested_model": "auto",
        "model": "tiny",
        "purpose": "chat",
        "stream": True,
    }
    return start | more  # type: ignore[return-value]  # a test may put in what the type forbids


def a_final(key: str, **more: Any) -> Final:
    final: dict[str, Any] = {
        "id": key,
        "status": "success",
        "error_code": "",
        "http_status": 200,
        "prompt_tokens": 5,
        "completion_tokens": 9,
        "cached_tokens": 0,
        "cache_write_tokens": 0,
        "reasoning_tokens": 0,
        "tokens_source": "provider",
        "ttft_ms": 12,
        "duration_ms": 340,
        "bytes_out": 4096,
        "client_disconnected": False,
        "trace": None,
    }
    return final | more  # type: ignore[return-value]
