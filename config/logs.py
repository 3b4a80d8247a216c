"""Logs: one JSON object a line with the request id, or readable lines on a terminal; no secret in either.

The redactor is a safety net of bounded cost, not the defence: secrets are a type that prints as dots. It looks only at
the first `MAX_TEXT` characters of each value and uses patterns without nested repetition, so that a hostile text costs
linear time (R37, R53).
"""

from __future__ import annotations

import re
from collections.abc import MutableMapping
from typing import Any

import orjson
import structlog

from audit.request_ids import REQUEST_ID

MAX_TEXT = 8192
DOTS = "••••"

SHAPES = re.compile(
    r"pen_(?:live|tmp)_[0-9A-Za-z]{8,}(?:_[0-9A-Za-z]{6})?"  # our own keys
    r"|\b(?:sk|rk|pk|gsk|fw|hf|xai|tgp)[-_][0-9A-Za-z_-]{12,}"  # vendors' keys
    r"|\bAIza[0-9A-Za-z_-]{20,}"
    r"|\beyJ[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}\.[0-9A-Za-z_-]{8,}"  # JSON web tokens
    r"|(?<=[Bb]earer )[^\s\"',]{8,}"
    r"|(?<=://)[^/\s:@]{1,100}:[^/\s@]{1,200}(?=@)"  # user:password in an address
)
NAMES = re.compile(
    r"(?:^|_|-)(?:api_?key|authorization|cookie|password|passwd|pepper|secret|set-cookie|token|x-api-key)s?$",
    re.IGNORECASE,
)


def redact_text(text: str) -> str:
    """`text`, cut to a bounded length, with everything that looks like a secret replaced by dots."""
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "…"
    return SHAPES.sub(DOTS, text)


def redact(value: Any, depth: int = 0) -> Any:
    """A copy of a log value without secrets: by the name of a field, and by the shape of a text."""
    if isinstance(value, str):
        return redact_text(value)
    if isinstance(value, bytes):
        return redact_text(value[:MAX_TEXT].decode("utf-8", "replace"))
    if depth >= 4:
        return redact_text(str(value)[:MAX_TEXT])
    if isinstance(value, dict):
        items = list(value.items())[:100]
        return {str(key): DOTS if NAMES.search(str(key)) else redact(item, depth + 1) for key, item in items}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, depth + 1) for item in list(value)[:100]]
    if value is None or isinstance(value, bool | int | float):
        return value
    return redact_text(str(value)[:MAX_TEXT])


def redact_event(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor around `redact`; keys that structlog itself owns keep their objects."""
    for key in list(event):
        if not key.startswith("_"):
            event[key] = DOTS if NAMES.search(key) else redact(event[key])
    return event


def add_request_id(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """The structlog processor that says to which request or task a line belongs."""
    if request_id := REQUEST_ID.get():
        event.setdefault("request_id", request_id)
    return event


def _to_json(value: Any, **_: Any) -> str:
    return orjson.dumps(value, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configuration(*, level: str, style: str, file: str = "") -> dict[str, Any]:
    """The dictionary for logging.config: everything through structlog's formatter, to standard error.

    style: "json" or "console". file: JSON lines go there, too (config.log_files).
    """
    shared: list[Any] = [
        add_request_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.stdlib.ExtraAdder(
            allow=["method", "path", "status_code", "duration_ms", "provider", "location", "version"]
        ),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="timestamp"),
        structlog.processors.format_exc_info,
        structlog.processors.UnicodeDecoder(),
    ]
    as_json = structlog.processors.JSONRenderer(serializer=_to_json)
    last = (
        as_json if style == "json" else _console(structlog.dev.ConsoleRenderer(colors=False, pad_event_to=0))
    )
    structlog.configure(
        processors=[*shared[:2], *shared[3:4], structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handlers: dict[str, Any] = {"stderr": {"class": "logging.StreamHandler", "formatter": "penstock"}}
    if file:
        handlers["file"] = {"class": "config.log_files.SharedFile", "path": file, "formatter": "file"}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"penstock": _formatter(shared, last), "file": _formatter(shared, as_json)},
        "handlers": handlers,
        "root": {"handlers": [*handlers], "level": level},
        "loggers": {
            # Django's own handler for DEBUG would say everything twice.
            "django": {"handlers": []},
            # These say at INFO or DEBUG what our own lines already say, some of them with headers.
            "httpx": {"level": "WARNING"},
            "httpcore": {"level": "WARNING"},
            "asyncio": {"level": "WARNING"},
            "kombu": {"level": "WARNING"},
            "amqp": {"level": "WARNING"},
            "celery.beat": {"level": "WARNING"},
            "celery.app.trace": {"level": "WARNING"},
            "celery.worker.strategy": {"level": "WARNING"},
            "axes": {"level": "WARNING"},
            "uvicorn.access": {"level": "WARNING"},
            "django.db.backends": {"level": "WARNING"},
            # It warns of every single attempt while the database is away, which we say once.
            "psycopg.pool": {"level": "ERROR"},
            "django.utils.autoreload": {"level": "WARNING"},
        },
    }


def _formatter(shared: list[Any], last: Any) -> dict[str, Any]:
    return {
        "()": structlog.stdlib.ProcessorFormatter,
        "processors": [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.EventRenamer("message"),
            redact_event,
            last,
        ],
        "foreign_pre_chain": shared,
    }


def _console(renderer: Any) -> Any:
    def render(logger: Any, method: str, event: MutableMapping[str, Any]) -> str:
        event["event"] = event.pop("message", "")
        return str(renderer(logger, method, event))

    return render
