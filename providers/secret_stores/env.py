"""`env://NAME`: the value of an environment variable of this process, except those that are our own secrets."""

from __future__ import annotations

import os
import re

from providers.crypto import Secret
from providers.errors import CredentialUnavailable

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OWN = re.compile(
    r"(?:PENSTOCK|DJANGO|JWT|OIDC|VAULT|OP|CELERY|SENTRY|METRICS|KEY_SERVER|SECRET|DATABASE|REDIS|PROXY|BACKUP)(?:_.*)?|PG.*|.*_FILE",
    re.IGNORECASE,
)
"""Whoever may write a reference must not be able to send the gateway's own keys to a server of his choice."""


def is_own(name: str) -> bool:
    return _OWN.fullmatch(name) is not None


class EnvStore:
    async def read(self, reference: str) -> Secret:
        if not _NAME.fullmatch(reference):
            raise CredentialUnavailable(detail="env:// needs the name of an environment variable")
        if is_own(reference):
            raise CredentialUnavailable(detail="env:// never reads a setting of the gateway itself")
        value = os.environ.get(reference, "").strip()
        if not value:
            raise CredentialUnavailable(detail=f"the environment variable {reference[:64]} is not set")
        return Secret(value)
