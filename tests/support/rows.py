"""Everything that an installation's database holds, read past Django: what a thief of the database would see."""

from __future__ import annotations

import base64
import contextlib
import sqlite3
import time
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

from tests.support.gateway import Gateway


def all_rows(gateway: Gateway) -> dict[str, list[str]]:
    """Table -> its rows as text, in order."""
    url = gateway.env.get("DATABASE_URL", "")
    return (
        _postgresql(url) if url.startswith("postgresql") else _sqlite(gateway.data_dir / "penstock.sqlite3")
    )


USAGE = (
    "request_id",
    "attempt",
    "provider",
    "status",
    "error_code",
    "prompt_tokens",
    "completion_tokens",
    "tokens_source",
    "ttft_ms",
    "stream",
)


def usage_rows(gateway: Gateway) -> list[dict[str, Any]]:
    """All usage records, with the columns that a ledger needs."""
    rows = query(gateway, f"SELECT {', '.join(USAGE)} FROM proxy_usagerecord")
    return [dict(zip(USAGE, row, strict=True)) for row in rows]


def query(gateway: Gateway, text: str) -> list[Any]:
    """What the installation's database answers."""
    url = gateway.env.get("DATABASE_URL", "")
    if url.startswith("postgresql"):
        with psycopg.connect(url) as connection:
            return connection.execute(text.encode()).fetchall()
    path = url.removeprefix("sqlite:///") or gateway.data_dir / "penstock.sqlite3"
    with contextlib.closing(sqlite3.connect(path)) as connected:
        return connected.execute(text).fetchall()


def settled_usage_rows(
    gateway: Gateway, *, seconds: float = 30.0, quiet: float = 7.0
) -> list[dict[str, Any]]:
    """The same, once no new record has come for `quiet` seconds (a worker closes a segment every five, and the drainer looks
    once a second)."""
    deadline = time.monotonic() + seconds
    rows, since = usage_rows(gateway), time.monotonic()
    while not rows or time.monotonic() - since < quiet:
        assert time.monotonic() < deadline, f"records keep coming, or none comes: {len(rows)}"
        time.sleep(0.1)
        if len(now := usage_rows(gateway)) != len(rows):
            rows, since = now, time.monotonic()
    return usage_rows(gateway)


def _postgresql(url: str) -> dict[str, list[str]]:
    with psycopg.connect(url) as connection:
        names = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'").fetchall()
        query = sql.SQL("SELECT t::text FROM {} t")
        return {
            name: sorted(
                text for (text,) in connection.execute(query.format(sql.Identifier(name))).fetchall()
            )
            for (name,) in names
        }


def _sqlite(path: Path) -> dict[str, list[str]]:
    with contextlib.closing(sqlite3.connect(path)) as connection:
        names = [
            name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
        ]
        return {
            name: sorted(repr(row) for row in connection.execute(f'SELECT * FROM "{name}"')) for name in names
        }


def spellings(secret: str) -> list[bytes]:
    """A secret as it might be hidden: plain, reversed, in hex, URL-encoded, in JSON, in Base64 at any offset."""
    data = secret.encode()
    found = [
        data,
        data[::-1],
        data.hex().encode(),
        data.hex().upper().encode(),
        quote(secret, safe="").encode(),
    ]
    for offset in range(3):
        padded = bytes(offset) + data
        # The ends also depend on what stands beside it.
        for text in (base64.b64encode(padded), base64.urlsafe_b64encode(padded)):
            found.append(text[4 if offset else 0 : -4])
    return found


def files_with(folder: Path, secret: str) -> list[str]:
    """The files below `folder` that hold the secret in some spelling."""
    words = spellings(secret)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if any(word in path.read_bytes() for word in words)]
