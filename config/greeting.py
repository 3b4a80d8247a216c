"""What `make run` tells when the gateway is up: addresses, login, and one line to paste that streams an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

KEY_HINT = (
    "Stream an answer, with your gateway key in PENSTOCK_GATEWAY_KEY "
    "(`.venv/bin/python manage.py issue_key NAME` makes another):"
)


@dataclass(frozen=True)
class Address:
    """Where the web process listens, and how people reach it."""

    host: str
    port: int
    public_url: str

    @property
    def local(self) -> str:
        """The host to ask when asking from this machine."""
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 -- compared, not bound


def greeting(address: Address, first: Mapping[str, Any], *, ready: bool) -> str:
    """What a newcomer needs next. first: what the command `first_run` answered; a secret in it is shown this once."""
    url, key = address.public_url, first.get("gateway_key")
    lines = [
        "",
        "Penstock is ready." if ready else "Penstock was stopped before it was ready. For the next start:",
        "",
        f"  Admin        {url}/admin/",
        f"  Base URL     {url}/v1   (for an OpenAI SDK)",
        f"  Login        {first.get('username')}",
    ]
    if first.get("password"):
        lines.append(f"  Password     {first['password']}   (shown only now)")
    if key:
        lines.append(f"  Gateway key  {key}   (shown only now)")
    lines += [
        "",
        "Stream an answer:" if key else KEY_HINT,
        "",
        curl_line(url, key or "$PENSTOCK_GATEWAY_KEY"),
        "",
    ]
    return "\n".join([*lines, "Ctrl-C stops everything.", ""] if ready else lines)


def curl_line(url: str, key: str) -> str:
    body = json.dumps(
        {
            "model": "echo/echo",
            "stream": True,
            "messages": [{"role": "user", "content": "Hello from Penstock"}],
        },
        separators=(",", ":"),
    )
    headers = f"-H \"Authorization: Bearer {key}\" -H 'Content-Type: application/json'"
    return f"curl -N {url}/v1/chat/completions {headers} -d '{body}'"
