"""What an upstream's refusal means, in the tree of `providers.errors`. Pure: status, headers and body in, an error out.

Phrases are needed because half of the servers say "too long" only in words. They are searched in a bounded piece of text,
by patterns without nested repetition, so that no upstream can keep us busy with them (R37).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from providers import errors
from providers.adapters.json_values import mapping, object_or_empty, text

MAX_RETRY_AFTER = 300.0
"""Seconds. No upstream may put itself out of use for longer (F07)."""

_SEARCHED = 8192
_CONTEXT_CODES = frozenset(
    {"context_length_exceeded", "exceed_context_size_error", "string_above_max_length"}
)
_POLICY_CODES = frozenset(
    {"content_policy_violation", "content_filter", "responsibleaipolicyviolation", "moderation_blocked"}
)
_KEY_CODES = frozenset({"invalid_api_key", "api_key_invalid"})
_KEY = re.compile(r"api[ _]key (?:not valid|expired|is invalid)|invalid api[ _]key", re.IGNORECASE)
_MODEL_CODES = frozenset({"model_not_found", "model_not_available", "invalid_model"})
_CONTEXT = re.compile(
    r"context[ _-](?:length|window|size|limit)|prompt is too long|input is too long|longer than the maximum model length"
    r"|maximum number of tokens|input token count|too many tokens|reduce the length of the (?:messages|prompt|input)"
    r"|exceeds? the (?:model's )?max(?:imum)? (?:input|sequence|model) length",
    re.IGNORECASE,
)
_POLICY = re.compile(
    r"content (?:management )?polic|usage polic|usage guidelines|safety system|content[ _]filter",
    re.IGNORECASE,
)
_MODEL = re.compile(
    r"model not exist|not a valid model|invalid model\b|unknown model|no such model"
    r"|\bmodel\b[^\n]{0,200}(?:does not exist|not found|is not available)",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Complaint:
    """An upstream's own words, out of the many shapes in which servers put them."""

    message: str = ""
    codes: frozenset[str] = frozenset()
    param: str | None = None
    number: int | None = None
    flagged: bool = False

    def says(self, codes: frozenset[str], phrases: re.Pattern[str]) -> bool:
        return bool(self.codes & codes) or phrases.search(self.message[:_SEARCHED]) is not None


def read_complaint(payload: Mapping[str, Any]) -> Complaint:
    """From `{"error": {...}}`, `{"error": "text"}`, `{"object": "error"}`, `{"message"}` or FastAPI's `{"detail"}`."""
    error = payload.get("error")
    body = error if isinstance(error, dict) else payload
    message = error if isinstance(error, str) else _message(body)
    codes = {text(body.get(name)).lower() for name in ("code", "type", "status")}
    codes |= {text(mapping(body.get("innererror")).get("code")).lower()}
    metadata = mapping(body.get("metadata"))
    if raw := text(metadata.get("raw")):
        message = f"{message}: {raw}"
    return Complaint(
        message=message,
        codes=frozenset(codes - {""}),
        param=text(body.get("param")) or None,
        number=_number(body.get("code")),
        flagged="flagged_input" in metadata or "reasons" in metadata,
    )


def _message(body: Mapping[str, Any]) -> str:
    for name in ("message", "detail", "msg"):
        value = body.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, dict):
            return _message(value)
        if isinstance(value, list):
            return "; ".join(text(mapping(item).get("msg")) for item in value[:10])
    return ""


def _number(code: Any) -> int | None:
    """A status inside an error, as llama.cpp, vLLM and OpenRouter write it."""
    if isinstance(code, str) and code.isascii() and code.isdigit() and len(code) == 3:
        code = int(code)
    return code if isinstance(code, int) and not isinstance(code, bool) and 400 <= code <= 599 else None


def classify(status: int, headers: Mapping[str, str], body: bytes) -> errors.ProviderError:
    """An HTTP answer that is not 2xx, as an error. The contract's table "What an upstream says becomes"."""
    complaint = read_complaint(object_or_empty(body))
    detail = complaint.message or body[: errors.MAX_DETAIL].decode(errors="replace")
    lowered = {name.lower(): value for name, value in headers.items()}
    return _decide(status, complaint, detail=detail, retry_after=retry_after(lowered))


def classify_event(payload: Mapping[str, Any]) -> errors.ProviderError:
    """An error inside a 200: in a stream, or in place of a completion. Its words are not passed on: of an answer with an
    error's status they are cleaned of the credential before they come here, of a good answer they are not (R53).
    """
    complaint = read_complaint(payload)
    status = complaint.number or _status_by_code(complaint)
    return _decide(status, complaint, detail=complaint.message, passed_on=False)


def _status_by_code(complaint: Complaint) -> int:
    by_word = (
        ("rate_limit", 429),
        ("overloaded", 529),
        ("authentication", 401),
        ("permission", 403),
        ("not_found", 404),
        ("invalid_request", 400),
        ("badrequest", 400),
    )
    return next((status for word, status in by_word if any(word in code for code in complaint.codes)), 500)


def _decide(
    status: int,
    complaint: Complaint,
    *,
    detail: str,
    retry_after: float | None = None,
    passed_on: bool = True,
) -> errors.ProviderError:
    kind: type[errors.UpstreamError] = _class_for(status, complaint)
    shown = (
        complaint.message[: errors.MAX_DETAIL]
        if passed_on and issubclass(kind, errors.UpstreamRefused)
        else None
    )
    if status == 402:
        shown = "The provider says that the account of this credential has run out."
    return kind(shown, detail=detail, upstream_status=status, retry_after=retry_after, param=complaint.param)


def _class_for(status: int, complaint: Complaint) -> type[errors.UpstreamError]:
    if 300 <= status < 400:
        return errors.UpstreamRedirect
    if status in {400, 413, 422} or complaint.codes & _CONTEXT_CODES:
        return _refusal(complaint)
    if status == 498 or (status == 403 and (complaint.flagged or complaint.codes & _POLICY_CODES)):
        return errors.ContentPolicyViolation
    if status == 404 or (status == 403 and complaint.codes & _MODEL_CODES):
        return errors.UpstreamModelNotFound
    if status in {401, 402, 403}:
        return errors.CredentialRejected
    if status == 429:
        return errors.UpstreamRateLimited
    if status == 408:
        return errors.UpstreamTimeout
    return errors.UpstreamFailed if status >= 400 else errors.ProtocolError


def _refusal(complaint: Complaint) -> type[errors.UpstreamError]:
    if complaint.says(_CONTEXT_CODES, _CONTEXT):
        return errors.ContextLengthExceeded
    if complaint.says(_POLICY_CODES, _POLICY):
        return errors.ContentPolicyViolation
    if complaint.says(_MODEL_CODES, _MODEL):
        return errors.UpstreamModelNotFound
    if complaint.says(_KEY_CODES, _KEY):  # Google says it with 400.
        return errors.CredentialRejected
    return errors.UpstreamRefused


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to stay away, at most 300, from lower-case headers; None when the upstream does not tell.

    A date is read against the answer's own `Date`, so that neither our clock nor a wrong one over there matters.
    """
    value = headers.get("retry-after", "").strip()
    seconds = _seconds(value)
    if seconds is None and value:
        seconds = _seconds_between(headers.get("date", ""), value)
    if seconds is None:
        milliseconds = _seconds(headers.get("retry-after-ms", "").strip())
        seconds = None if milliseconds is None else milliseconds / 1000
    return None if seconds is None else min(max(seconds, 0.0), MAX_RETRY_AFTER)


def _seconds(value: str) -> float | None:
    try:
        seconds = float(value[:32])
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None


def _seconds_between(start: str, end: str) -> float | None:
    try:
        return (parsedate_to_datetime(end) - parsedate_to_datetime(start)).total_seconds()
    except (ValueError, TypeError, OverflowError):
        return None
