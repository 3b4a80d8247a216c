"""Validators of columns that hold structure."""

from __future__ import annotations

import json
import re
import ssl
from typing import Any

from django.core.exceptions import ValidationError

from audit.strict_json import StrictJSONError, loads

NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,64}")
VALUE = re.compile(r"[\x20-\x7e\xa1-\xff]{0,8192}")
FORBIDDEN = frozenset(
    [
        "host",
        "content-length",
        "transfer-encoding",
        "connection",
        "upgrade",
        "te",
        "trailer",
        "keep-alive",
        "authorization",
        "proxy-authorization",
        "proxy-connection",
        "cookie",
        "set-cookie",
        "expect",
        "accept-encoding",
        "content-type",
        "x-api-key",
        "api-key",
        "x-goog-api-key",
    ]
)
MAX_HEADERS = 32
MAX_METADATA = 16_384


def header_problem(name: Any, value: Any) -> str:
    """What is wrong with one custom header, or nothing. Also asked when dialling, for rows written past the forms (R27)."""
    if not isinstance(name, str) or not isinstance(value, str):
        return "A header's name and value are text."
    if not NAME.fullmatch(name):
        return f"{name[:64]!r} is not a header name."
    if name.lower() in FORBIDDEN or name.lower().startswith("x-forwarded-"):
        return f"{name} is set by the gateway itself."
    if not VALUE.fullmatch(value):
        return f"The value of {name} has control characters, is not Latin-1, or is above 8 KiB."
    return ""


def check_headers(headers: Any) -> None:
    """At most 32 headers, none that the gateway or the connection owns, no control characters."""
    if not isinstance(headers, dict):
        raise ValidationError("Write an object of header names and values.")
    if len(headers) > MAX_HEADERS:
        raise ValidationError(f"At most {MAX_HEADERS} headers.")
    for name, value in headers.items():
        if problem := header_problem(name, value):
            raise ValidationError(problem)


def check_metadata(metadata: Any) -> None:
    """An object of at most 16 KiB that every database can hold and every reader of JSON can read again."""
    if not isinstance(metadata, dict):
        raise ValidationError("Write an object.")
    text = json.dumps(metadata)
    if len(text) > MAX_METADATA:
        raise ValidationError("At most 16 KiB.")
    try:
        loads(text.encode())
    except StrictJSONError as error:
        raise ValidationError(str(error)) from error


def check_ca(pem: str) -> None:
    try:
        ssl.create_default_context(cadata=pem)
    except (ssl.SSLError, ValueError, TypeError) as error:  # TypeError: it is not ASCII
        raise ValidationError("This is not a PEM certificate.") from error
