"""Values sealed in our own database: opened for the row and the origin they were sealed for, and for no other."""

from __future__ import annotations

from prometheus_client import Counter

from providers import crypto
from providers.errors import CredentialUnavailable

FAILURES = Counter("credential_decrypt_failures_total", "Secrets that could not be opened.")


def open_sealed(stored: str, *, uid: str, origin: str) -> crypto.Secret:
    """Raises CredentialUnavailable when anything about it was changed, KeyringUnavailable when there is no keyring."""
    aad = crypto.aad_for("providers.apikey", "secret", uid, origin)
    try:
        return crypto.current_keyring().open(stored, aad=aad)
    except CredentialUnavailable:
        FAILURES.inc()
        raise
