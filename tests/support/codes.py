"""Second factors for tests: what an authenticator app would show."""

from __future__ import annotations

import time
from typing import Any

from allauth.mfa.recovery_codes.internal.auth import RecoveryCodes
from allauth.mfa.totp.internal.auth import TOTP, format_hotp_value, generate_totp_secret, hotp_value

from audit.changes import changes

PERIOD = 30


def code_of(secret: str, *, steps: int = 0) -> str:
    """What the app shows now, or so many half minutes later."""
    return str(format_hotp_value(hotp_value(secret, int(time.time()) // PERIOD + steps)))


def enrol(user: Any) -> tuple[str, list[str]]:
    """The secret of a new app of `user`, and the recovery codes that came with it."""
    secret = generate_totp_secret()
    with changes(actor=user, via="system"):
        TOTP.activate(user, secret)
        codes = RecoveryCodes.activate(user).generate_codes()
    return secret, codes
