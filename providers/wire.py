"""Neutral shapes that adapters, the data plane and the control plane share. Pure: no Django, no socket, no clock.

An adapter is a `Kind`: a record of pure functions for each operation. An operation that is `None` cannot be done
with that kind of provider. Adapters turn our shapes into a `WireRequest` and bytes into our shapes; who dials, and with
which secret, is not their business.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from providers import errors

Headers = tuple[tuple[str, str], ...]
Purpose = Literal["chat", "embeddings", "reranking"]
ProbeStatus = Literal["online", "degraded", "timeout", "unreachable", "error", "unknown"]

DEFAULT_PORTS = {"http": 80, "https": 443}


@functools.lru_cache(maxsize=4096)
def origin_of(url: str) -> str:
    """`scheme://host:port` with the port always written out, lower case: what a secret is bound to."""
    parts = urlsplit(url)
    scheme = parts.scheme.lower()
    return f"{scheme}://{(parts.hostname or '').lower()}:{parts.port or DEFAULT_PORTS.get(scheme, 0)}"


@dataclass(frozen=True, slots=True)
class Timeouts:
    """Seconds. `stream` and `request` are whole-answer caps, for a streamed and a plain request."""

    connect: float = 5.0
    first_token: float = 60.0
    idle: float = 120.0
    stream: float = 1800.0
    request: float = 600.0


class Quota(NamedTuple):
    """How much may be asked: requests and tokens a minute, and requests at the same time. None is no limit."""

    requests: int | None = None
    tokens: int | None = None
    running: int | None = None


@dataclass(frozen=True, slots=True)
class Credential:
    """A key as it is stored: sealed text or a reference (`env://NAME`), never the value itself.

    quota: what is asked with it at the most, so that we stay below the vendor's own limits.
    """

    key_id: int
    uid: str
    name: str
    stored: str = field(repr=False)
    weight: int = 1
    quota: Quota | None = None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a provider is and how it may be dialled."""

    provider_id: int
    uid: str
    slug: str
    name: str
    kind: str
    base_url: str
    headers: Headers = ()
    allow_private: bool = False
    ca_pem: str = ""
    timeouts: Timeouts = Timeouts()

    @property
    def origin(self) -> str:
        return origin_of(self.base_url)


class WireRequest(NamedTuple):
    """One HTTP request without its credential, which is added by the one who dials."""

    method: str
    url: str
    headers: Headers = ()
    body: bytes | None = None
    authorize: Callable[[str], Headers] | None = None
    """How this request carries the secret, where that differs from its kind's way."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A whole HTTP answer, its body bounded by the one who dialled."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Usage(NamedTuple):
    """Token counts as the provider gave them. `prompt` includes cached tokens, `completion` includes reasoning."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    cache_write: int = 0
    reasoning: int = 0


class Event(NamedTuple):
    """What one event of an upstream's stream means for us.

    commits: it carries content, reasoning, a tool call or a finish reason, so the answer has begun.
    finish_reason: the first that there is; finished: how many of its choices have one.
    usage_only: it exists because we asked for usage, and is not passed on to a caller who did not.
    error: the provider reports a failure inside its stream.
    """

    commits: bool = False
    finish_reason: str | None = None
    finished: int = 0
    usage: Usage | None = None
    usage_only: bool = False
    done: bool = False
    error: errors.ProviderError | None = None


class Completion(NamedTuple):
    """A whole answer, as far as we need to understand it."""

    usage: Usage | None
    finish_reason: str | None


@dataclass(frozen=True, slots=True)
class Model:
    """A model that a provider says it has. `purposes` is empty when the provider does not tell."""

    id: str
    purposes: tuple[Purpose, ...] = ()
    context_window: int | None = None
    dimensions: int | None = None
    capabilities: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Reading:
    """What a probe or test saw. `status` online is a 2xx that makes sense; anything else counts as a failure."""

    status: ProbeStatus
    status_code: int | None = None
    detail: str = ""
    latency_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Chat:
    """Chat completions.

    request(endpoint, body, model, stream): `body` is the caller's request, already without our own fields; the
        function never changes it. A streamed request always asks for usage.
    around_text(raw): what stands before and behind the text in an event that read_event found to hold a piece of text and
        nothing else; None where that cannot be told. An event that differs from it in its text alone means the same.
    read_event(data): the data of one event to its meaning. Raises errors.ProtocolError when it is not the protocol.
    read_completion(body): a whole 200 body. Raises errors.ProviderError when it is not an answer.
    prefill(body, text): the request that goes on with an answer that begins with `text`; None where no kind of it is known.
    """

    request: Callable[[Endpoint, Mapping[str, Any], str, bool], WireRequest]
    around_text: Callable[[bytes], tuple[bytes, bytes] | None]
    read_event: Callable[[bytes], Event]
    read_completion: Callable[[bytes], Completion]
    prefill: Callable[[Mapping[str, Any], str], Mapping[str, Any]] | None = None


@dataclass(frozen=True, slots=True)
class Models:
    """Discovery. parse raises errors.ProtocolError when the body is not a list of models."""

    request: Callable[[Endpoint], WireRequest]
    parse: Callable[[bytes], tuple[Model, ...]]


@dataclass(frozen=True, slots=True)
class Probe:
    """The cheapest question that tells whether the endpoint, or a key, is good. It never costs a completion.

    Self-hosted kinds ask their native endpoint; vendors ask for what needs a valid key.
    """

    request: Callable[[Endpoint], WireRequest]
    read: Callable[[Answer], Reading]


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of provider: a table line, or a small file, of pure functions."""

    name: str
    label: str
    self_hosted: bool
    base_url: str
    authorize: Callable[[str], Headers]
    classify: Callable[[int, Mapping[str, str], bytes], errors.ProviderError]
    chat: Chat | None = None
    models: Models | None = None
    probe: Probe | None = None
    needs_key: bool = False
    local: Callable[[WireRequest], Answer] | None = None
    """A kind that is answered inside this process (echo), so nothing is dialled."""
