"""Values sealed in our own database: opened for the row and the origin they were sealed for, and for no other."""

from __future__ import annotations

from providers import crypto


def open_sealed(stored: str, *, uid: str, origin: str) -> crypto.Secret:
    """Raises CredentialUnavailable when anything about it was changed, KeyringUnavailable when there is no keyring."""
    aad = crypto.aad_for("providers.apikey", "secret", uid, origin)
    return crypto.current_keyring().open(stored, aad=aad)
