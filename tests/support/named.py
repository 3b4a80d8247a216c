"""Behaviours by the name of the model that a request asks for, for tests that cannot reach the upstream's script."""

from __future__ import annotations

from collections.abc import Callable

from tests.support import faults
from tests.support.answers import content_policy, context_too_long, ok, status, unauthorized
from tests.support.http_server import Behaviour

BY_NAME: dict[str, Callable[[str], Behaviour]] = {
    "ok": lambda text: ok(chunks=int(text or 5)),
    "drip": lambda text: faults.drip(float(text)),
    "status": lambda text: status(int(text)),
    "429": lambda text: status(429, retry_after=text or None),
    "401": lambda _: unauthorized(),
    "context": lambda _: context_too_long(),
    "policy": lambda _: content_policy(),
    "reset": lambda _: faults.reset_before_headers(),
    "hang": lambda _: faults.silence(),
    "hang_headers": lambda _: faults.headers_then_silence(),
    "late": lambda text: faults.late_first_token(float(text)),
    "hang_after": lambda text: faults.stall_after(int(text)),
    "rst_after": lambda text: faults.reset_after(int(text)),
    "fin_after": lambda text: faults.unterminated_after(int(text)),
    "closed_after": lambda text: faults.closed_after(int(text)),
    "ended_after": lambda text: faults.ended_after(int(text)),
    "garbage": lambda text: faults.garbage_event(int(text or 0)),
    "bad_utf8": lambda _: faults.bad_utf8(),
    "every_byte": lambda _: faults.every_byte(),
    "redirect": lambda text: faults.redirect(307, text),
    "gzip_bomb": lambda _: faults.gzip_bomb(),
    "huge_line": lambda _: faults.huge_line(),
    "huge_json": lambda _: faults.huge_json(),
    "huge_headers": lambda _: faults.huge_headers(),
    "flood": lambda _: faults.flood_of_1xx(),
    "html": lambda _: faults.html(),
    "noise": lambda _: faults.noise(),
    "empty": lambda _: faults.empty(),
    "done_first": lambda _: faults.done_first(),
    "no_done": lambda _: faults.no_done(),
    "error_in_200": lambda text: faults.error_in_200(int(text or 0)),
    "leaky": lambda _: faults.leaky(),
    "close": lambda _: faults.close_after_answer(),
}
"""Behaviours for models named `do-<name>` or `do-<name>:<argument>`, such as `do-rst_after:3`."""


def by_model(model: str) -> Behaviour | None:
    """The behaviour that a model's name asks for, if it does."""
    name, _, argument = model.removeprefix("do-").partition(":")
    return BY_NAME[name](argument) if model.startswith("do-") and name in BY_NAME else None
