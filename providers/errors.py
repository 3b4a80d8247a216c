"""Everything that can go wrong between us and a provider, as one tree.

    ProviderError
    ├── UnknownKind                 a provider row names a kind that no adapter serves
    ├── CredentialUnavailable       the secret cannot be opened; nothing was dialled
    │   ├── KeyringUnavailable      there is no usable keyring at all
    │   └── CredentialUndecryptable the sealed value was changed, or belongs elsewhere
    ├── DestinationNotAllowed       the address may not be dialled
    ├── HeaderNotAllowed            a custom header of the row may not be sent
    └── UpstreamError               something was dialled, and it went wrong
        ├── ConnectFailed           refused, unreachable, no such name
        ├── TlsError                the certificate or the handshake is not acceptable
        ├── UpstreamTimeout         connect, first token or whole answer took too long
        ├── UpstreamFailed          5xx, 529
        ├── UpstreamRateLimited     429
        ├── CredentialRejected      401, 403
        ├── UpstreamModelNotFound   404
        ├── UpstreamRefused         other 400 and 422: the caller's request, passed on
        │   ├── ContextLengthExceeded
        │   └── ContentPolicyViolation
        ├── UpstreamRedirect        3xx; never followed
        ├── ProtocolError           what came back is not the protocol
        ├── EmptyResponse           200 and nothing in it
        ├── Interrupted             the stream broke after it had begun
        │   └── AnotherAnswer       it was begun again, and is another one
        └── Stalled                 the stream went silent after it had begun

Each class carries its whole decision, so that nobody downstream needs a table: `status` and `code` are what the
caller of the data plane gets (the contract's table of errors), `failover` says whether the next candidate may be
tried, `again` whether the same one may be asked once more, and `blame` says what is marked: the provider (its circuit
and health), the key, or nothing.
"""

from __future__ import annotations

from typing import ClassVar, Literal

Blame = Literal["provider", "key", "nobody"]

MAX_DETAIL = 2048
"""Characters of an upstream's error text that are ever kept (R30)."""


class ProviderError(Exception):
    """Base of the tree. `message` is safe to show to the caller: it never holds a secret or an address."""

    status: ClassVar[int] = 502
    code: ClassVar[str] = "upstream_error"
    failover: ClassVar[bool] = True
    again: ClassVar[bool] = False
    blame: ClassVar[Blame] = "nobody"
    dialled: ClassVar[bool] = False
    message: ClassVar[str] = "The provider could not answer."

    def __init__(
        self,
        message: str | None = None,
        *,
        detail: str = "",
        upstream_status: int | None = None,
        retry_after: float | None = None,
        param: str | None = None,
    ) -> None:
        """`detail` is for logs and operators, truncated; `retry_after` is in seconds."""
        self.text = message or self.message
        self.detail = detail[:MAX_DETAIL]
        self.upstream_status = upstream_status
        self.retry_after = retry_after
        self.param = param
        super().__init__(self.text)


class UnknownKind(ProviderError):
    status = 503
    code = "no_provider_available"
    message = "No adapter serves this kind of provider."


class CredentialUnavailable(ProviderError):
    status = 503
    code = "credential_unavailable"
    message = "The credential of this provider cannot be used."


class KeyringUnavailable(CredentialUnavailable):
    failover = False
    message = "The keyring cannot be opened."


class CredentialUndecryptable(CredentialUnavailable):
    pass


class DestinationNotAllowed(ProviderError):
    code = "destination_not_allowed"
    message = "The address of this provider may not be dialled."


class HeaderNotAllowed(ProviderError):
    message = "A custom header of this provider may not be sent."


class UpstreamError(ProviderError):
    dialled = True
    blame: ClassVar[Blame] = "provider"


class ConnectFailed(UpstreamError):
    again = True
    message = "The provider could not be reached."


class TlsError(UpstreamError):
    code = "tls_error"
    message = "The provider's certificate or TLS handshake is not acceptable."


class UpstreamTimeout(UpstreamError):
    status = 504
    code = "upstream_timeout"
    message = "The provider did not answer in time."


class UpstreamFailed(UpstreamError):
    again = True
    message = "The provider answered with an error."


class UpstreamRateLimited(UpstreamError):
    again = True
    status = 429
    code = "rate_limit_exceeded"
    blame = "key"
    message = "The provider is limiting requests."


class CredentialRejected(UpstreamError):
    status = 503
    code = "credential_unavailable"
    blame = "key"
    message = "The provider does not accept the credential stored for it."


class UpstreamModelNotFound(UpstreamError):
    status = 404
    code = "model_not_found"
    blame = "nobody"
    message = "The provider has no such model."


class UpstreamRefused(UpstreamError):
    status = 400
    code = "invalid_request"
    failover = False
    blame = "nobody"
    message = "The provider does not accept this request."


class ContextLengthExceeded(UpstreamRefused):
    code = "context_length_exceeded"
    message = "The prompt is longer than the model's context."


class ContentPolicyViolation(UpstreamRefused):
    code = "content_policy_violation"
    message = "The provider's content policy refuses this request."


class UpstreamRedirect(UpstreamError):
    code = "upstream_redirect"
    message = "The provider answered with a redirect, which is never followed."


class ProtocolError(UpstreamError):
    code = "upstream_protocol_error"
    message = "The provider's answer could not be understood."


class EmptyResponse(UpstreamError):
    again = True
    code = "empty_response"
    message = "The provider's answer was empty."


class Interrupted(UpstreamError):
    again = True
    code = "upstream_interrupted"
    message = "The provider's stream broke before it was complete."


class AnotherAnswer(Interrupted):
    """Asked once more for an answer that broke, a provider gave another one: its good right, and no use."""

    again = False
    blame = "nobody"


class Stalled(UpstreamError):
    status = 504
    code = "upstream_stalled"
    message = "The provider's stream went silent before it was complete."
