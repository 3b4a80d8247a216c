"""What an attempt teaches about its provider and its key, told to those who decide where the next requests go."""

from __future__ import annotations

from contextlib import AbstractContextManager
from types import TracebackType

from providers.errors import CredentialRejected, CredentialUndecryptable, ProviderError, UpstreamRateLimited
from proxy.attempts import Attempt
from proxy.gateway import Gateway


class Noted(AbstractContextManager[None]):
    """Around an attempt. A provider that says no to a request is well; one that was not heard of is neither well nor not."""

    __slots__ = ("_attempt", "_gateway", "_id")

    def __init__(self, gateway: Gateway, attempt: Attempt) -> None:
        self._gateway = gateway
        self._attempt = attempt
        self._id = attempt.candidate.upstream.id

    def __enter__(self) -> None:
        self._gateway.breakers.trying(self._id)
        self._gateway.routes.began(self._id)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._gateway.routes.ended(self._id)
        if error is None:
            self._succeeded()
        elif isinstance(error, ProviderError):
            self._failed(error)
        else:
            self._gateway.breakers.called_off(self._id)

    def _succeeded(self) -> None:
        gateway, attempt = self._gateway, self._attempt
        gateway.breakers.succeeded(self._id)
        gateway.cooldowns.accepted(attempt.candidate.rests_as)
        if attempt.ttft_ms is not None:
            gateway.routes.answered(self._id, attempt.candidate.model, attempt.ttft_ms)
        key = attempt.candidate.credential
        if key is not None and key.key_id in gateway.watcher.weather.rejected:
            gateway.watcher.accepted(key.key_id)

    def _failed(self, error: ProviderError) -> None:
        gateway, candidate = self._gateway, self._attempt.candidate
        if error.blame == "provider":
            gateway.breakers.failed(self._id)
            gateway.watcher.suspect(self._id)
        elif error.dialled:
            gateway.breakers.succeeded(self._id)
        else:
            gateway.breakers.called_off(self._id)
        if isinstance(error, UpstreamRateLimited):
            # Where the provider did not say for how long, it is we who do: to the caller, and to the one who asks again.
            error.retry_after = gateway.cooldowns.limited(candidate.rests_as, error.retry_after)
        elif isinstance(error, CredentialRejected) and candidate.credential:
            gateway.watcher.rejected(candidate.credential.key_id)
        elif isinstance(error, CredentialUndecryptable) and candidate.credential:
            gateway.watcher.undecryptable(candidate.credential.key_id)
