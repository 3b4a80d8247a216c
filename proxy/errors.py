"""What we ourselves refuse on the data plane, as one tree; what providers do wrong is in providers.errors.

GatewayError
├── InvalidRequest          400; InvalidJson, ContextTooLong
├── InvalidApiKey           401
├── PaymentRequired         402: BudgetExceeded, PriceUnknown
├── AddressNotAllowed       403 by address
├── ModelNotAllowed         403 by the key's scope
├── NotFound                404; ModelNotFound
├── RequestTimeout          408
├── RequestTooLarge         413
├── UnsupportedMediaType    415
├── RateLimited             429; ConcurrencyLimited, UpstreamsLimited
└── Unavailable             503: NoProviderAvailable, UsageLogUnavailable, BudgetUnavailable, ShuttingDown, Overloaded, KeyRevoked (in a stream)
"""

from __future__ import annotations

from typing import ClassVar


class GatewayError(Exception):
    """`text` is for the caller; `retry_after` is in seconds."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    message: ClassVar[str] = "Something went wrong in the gateway."
    wait: ClassVar[float | None] = None

    def __init__(
        self,
        message: str | None = None,
        *,
        param: str | None = None,
        retry_after: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        self.text = message or self.message
        self.param = param
        self.retry_after = self.wait if retry_after is None else retry_after
        self.headers = headers
        super().__init__(self.text)


class InvalidRequest(GatewayError):
    status = 400
    code = "invalid_request"
    message = "The request is not valid."


class InvalidJson(InvalidRequest):
    code = "invalid_json"
    message = "The body is not a JSON object."


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"
    message = "The prompt is longer than the context of every model that could answer."


class InvalidApiKey(GatewayError):
    status = 401
    code = "invalid_api_key"
    message = "The gateway key is missing, unknown, revoked or expired."


class PaymentRequired(GatewayError):
    """Clients must not try again by themselves: nothing changes before a person or a new window does."""

    status = 402

    def __init__(self, message: str | None = None, *, param: str | None = None) -> None:
        super().__init__(message, param=param, headers=((b"x-should-retry", b"false"),))


class BudgetExceeded(PaymentRequired):
    code = "budget_exceeded"
    message = "This request could cost more than is left of the budget."


class PriceUnknown(PaymentRequired):
    code = "price_unknown"
    message = "What this model costs is not known, and there is a budget to keep."


class AddressNotAllowed(GatewayError):
    status = 403
    code = "ip_not_allowed"
    message = "This key may not be used from this address."


class ModelNotAllowed(GatewayError):
    status = 403
    code = "model_not_allowed"
    message = "This key may not use this model."


class NotFound(GatewayError):
    status = 404
    code = "not_found"
    message = "There is nothing at this path."


class ModelNotFound(NotFound):
    code = "model_not_found"
    message = "No provider has this model."


class MethodNotAllowed(GatewayError):
    status = 405
    code = "invalid_request"
    message = "This path does not answer this method."


class RequestTimeout(GatewayError):
    status = 408
    code = "request_timeout"
    message = "The body of the request did not arrive in time."


class RequestTooLarge(GatewayError):
    status = 413
    code = "request_too_large"
    message = "The body of the request is too large."


class UnsupportedMediaType(GatewayError):
    status = 415
    code = "unsupported_media_type"
    message = "Send application/json, without a content encoding."


class RateLimited(GatewayError):
    status = 429
    code = "rate_limit_exceeded"
    message = "This key has reached its limit of requests."
    wait = 1


class ConcurrencyLimited(RateLimited):
    code = "concurrency_limit_exceeded"
    message = "This key has reached its limit of requests at the same time."


class UpstreamsLimited(RateLimited):
    message = "Every provider that could answer is limiting requests."


class Unavailable(GatewayError):
    status = 503
    code = "overloaded"
    message = "The gateway cannot take this request now."
    wait = 5


class Overloaded(Unavailable):
    message = "The gateway is busy with other requests."
    wait = 1


class NoProviderAvailable(Unavailable):
    code = "no_provider_available"
    message = "No provider can take this request now."


class CredentialMissing(Unavailable):
    code = "credential_unavailable"
    message = "The provider has no usable key."


class UsageLogUnavailable(Unavailable):
    code = "usage_log_unavailable"
    message = "The usage of this request could not be recorded, so it was not sent."


class BudgetUnavailable(Unavailable):
    code = "budget_unavailable"
    message = "What is left of the budget cannot be asked for now, so the request was not sent."
    wait = 2


class ConfigurationUnavailable(Unavailable):
    code = "no_provider_available"
    message = "The gateway has lost its configuration."


class ShuttingDown(Unavailable):
    code = "server_shutting_down"
    message = "The gateway is shutting down."


class KeyRevoked(GatewayError):
    status = 401
    code = "key_revoked"
    message = "The gateway key was revoked while it was used."
