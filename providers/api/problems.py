"""How errors of providers are answered by the control plane."""

from __future__ import annotations

from audit.api_errors import RETRY_SECONDS, Problem, know
from providers.errors import CredentialUnavailable, ProviderError
from providers.keyring import WrongEncryptionKey


def _of_provider(error: ProviderError) -> Problem:
    return Problem(502, error.text)


def _of_credential(error: CredentialUnavailable) -> Problem:
    return Problem(503, error.text, retry_after=RETRY_SECONDS)


def _of_keyring(error: WrongEncryptionKey) -> Problem:
    return Problem(503, "Secrets cannot be sealed or opened now; see the log.", retry_after=RETRY_SECONDS)


know(ProviderError, _of_provider)
know(CredentialUnavailable, _of_credential)
know(WrongEncryptionKey, _of_keyring)
