"""The id that belongs to what is being done: said in every log line of it, and in its audit entries."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

WELL_FORMED = re.compile(r"[A-Za-z0-9._:-]{1,128}")

REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
"""Empty outside requests and tasks."""


def request_id_from(given: str | None) -> str:
    """The caller's id when it is 1-128 letters, digits or `._:-`, else a fresh one; also for a key in its place, for ids are kept."""
    if given and WELL_FORMED.fullmatch(given) and not given.startswith("pen_"):
        return given
    return f"{random.getrandbits(128):032x}"  # It opens nothing, and the kernel is slow to ask.


@contextmanager
def within(request_id: str) -> Iterator[None]:
    """What happens in the block belongs to this id."""
    token = REQUEST_ID.set(request_id)
    try:
        yield
    finally:
        REQUEST_ID.reset(token)
