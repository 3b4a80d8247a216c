"""Sessions in the database that end by themselves: after SESSION_COOKIE_AGE in all, and after SESSION_IDLE_SECONDS of silence.

This is the session engine, so the limits hold wherever a session is read, and cost nothing where none is.
"""

from __future__ import annotations

import time
from typing import Any

from asgiref.sync import sync_to_async
from django.conf import settings
from django.contrib.auth import SESSION_KEY
from django.contrib.sessions.backends import db

STARTED, SEEN = "started_at", "seen_at"
"""Epoch seconds of the login, and of the last request that was noted."""
NOTE_EVERY = 60
"""Seconds. Not every request writes its session."""


def begin(session: Any) -> None:
    """The clock of a session starts with the login."""
    session[STARTED] = session[SEEN] = time.time()


class SessionStore(db.SessionStore):
    def load(self) -> dict[str, Any]:
        data = super().load()
        if SESSION_KEY not in data:
            return data
        now = time.time()
        if self._is_over(data, now):
            self.delete(self.session_key)
            self._session_key = None
            return {}
        if now - data.get(SEEN, 0) >= NOTE_EVERY:
            data[SEEN] = now
            data.setdefault(STARTED, now)
            self.modified = True
        return data

    async def aload(self) -> dict[str, Any]:
        """The same rules for whoever does not wait in a thread."""
        return await sync_to_async(self.load)()

    @staticmethod
    def _is_over(data: dict[str, Any], now: float) -> bool:
        started, seen = float(data.get(STARTED, now)), float(data.get(SEEN, now))
        return now - started >= settings.SESSION_COOKIE_AGE or now - seen >= settings.SESSION_IDLE_SECONDS
