"""Three ledgers that have to agree: what callers were told, what upstreams saw, and what was recorded.

A history check in the manner of Jepsen. Requests are asked with `tests.support.told`, so a request's name is its prompt and its
`x-request-id`; the records are those of the spool (`House.records`) or rows of the database with the same names.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tests.support.ledger import Record
from tests.support.told import Told
from tests.support.upstream import Upstream

UNASKED = {
    "server_shutting_down",
    "no_provider_available",
    "credential_unavailable",
    "usage_log_unavailable",
    "overloaded",
}
"""Codes of answers for which nothing was dialled, so that they have no record."""


def reconcile(
    tolds: Iterable[Told], records: Iterable[Mapping[str, Any]], upstreams: Mapping[str, Upstream]
) -> None:
    """Assert that the three agree. upstreams: by the provider's slug; every one that was asked."""
    attempts: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        attempts[record["request_id"]].append(dict(record))
    for rows in attempts.values():
        rows.sort(key=lambda row: int(row["attempt"]))
    served = _served(upstreams)
    told_names: set[str] = set()
    for told in tolds:
        told_names.add(told.name)
        _check_attempts(told, attempts.get(told.name, []))
        _check_told(told, attempts.get(told.name, []))
    _check_upstreams(attempts, served)
    unknown = attempts.keys() - told_names
    assert not unknown, ("recorded, and asked by nobody", sorted(unknown)[:5])


def name_of(record: Record) -> str:
    """Whose request this was: the first thing its user said."""
    messages = record.json["messages"] if isinstance(record.json, dict) else []
    return next((str(each["content"]) for each in messages if each["role"] == "user"), "")


def _served(upstreams: Mapping[str, Upstream]) -> dict[tuple[str, str], list[Record]]:
    """What each upstream saw of each request, in order."""
    found: defaultdict[tuple[str, str], list[Record]] = defaultdict(list)
    for slug, upstream in upstreams.items():
        for record in upstream.ledger.asked:
            found[name_of(record), slug].append(record)
    return found


def _check_attempts(told: Told, rows: list[dict[str, Any]]) -> None:
    """The attempts of a request are numbered, few, and only the last of them can be the answer."""
    about = (told.name, told.status, told.code, rows)
    assert [row["attempt"] for row in rows] == list(range(1, len(rows) + 1)), ("numbered", *about)
    assert len(rows) <= 3, ("more than three dials", *about)
    assert not any(row["status"] == "success" for row in rows[:-1]), ("answered twice", *about)
    for row in rows:
        if row["status"] != "success" and row["ttft_ms"] is None:
            assert row["completion_tokens"] == 0, ("a failed attempt is billed as a completion", *about)


def _check_told(told: Told, rows: list[dict[str, Any]]) -> None:
    about = (told.name, told.status, told.code, rows)
    if told.ended_well:
        assert rows and rows[-1]["status"] == "success", ("an answer without its record", *about)
    elif told.left:
        return  # whatever came first, the end or the leaving
    elif told.status == 200 or told.code not in UNASKED | {"rate_limit_exceeded"}:
        assert rows and rows[-1]["status"] != "success", ("an error that is recorded as a success", *about)


def _check_upstreams(
    attempts: Mapping[str, list[dict[str, Any]]], served: Mapping[tuple[str, str], list[Record]]
) -> None:
    """Every request that reached an upstream is one record, and every record is one request or reached nobody."""
    recorded = Counter((name, row["provider"]) for name, rows in attempts.items() for row in rows)
    for (name, slug), seen in served.items():
        rows = [row for row in attempts.get(name, []) if row["provider"] == slug]
        # A pooled connection that breaks before a byte of an answer came may be replaced once by a fresh one (F13).
        unanswered = sum(record.status is None for record in seen)
        assert len(rows) <= len(seen) <= len(rows) + unanswered, ("asked and not recorded", name, slug, rows)
        successes = [row for row in rows if row["status"] == "success" and row["tokens_source"] == "provider"]
        for row in successes:
            assert row["completion_tokens"] == seen[-1].chunks_sent or not row["stream"], (
                "other tokens than the provider counted",
                row,
                seen[-1],
            )
    for (name, slug), number in recorded.items():
        reached = len(served.get((name, slug), ()))
        rows = [row for row in attempts[name] if row["provider"] == slug]
        for row in rows[reached:]:
            assert row["status"] in {"error", "client_disconnected", "interrupted"}, ("nobody was asked", row)
            assert row["completion_tokens"] == 0, ("nobody was asked", row, number)
