"""What an installation needs before it can start."""

from __future__ import annotations

import base64
import secrets


def fresh_secrets() -> dict[str, str]:
    """The secrets that an installation needs, new."""
    return {
        "SECRET_KEY": secrets.token_urlsafe(64),
        "JWT_SIGNING_KEY": secrets.token_urlsafe(64),
        "PENSTOCK_ENCRYPTION_KEY": base64.urlsafe_b64encode(secrets.token_bytes(32)).decode(),
        "PENSTOCK_PEPPERS": "1:" + base64.urlsafe_b64encode(secrets.token_bytes(48)).decode(),
    }
