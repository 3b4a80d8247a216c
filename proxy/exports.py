"""Tables as CSV files: written as they are read, a piece at a time, so that a long one needs no more memory than a short one."""

from __future__ import annotations

import csv
import io
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import Any

from asgiref.sync import sync_to_async
from django.core.handlers.asgi import ASGIRequest
from django.db import connection
from django.db.models import Q
from django.db.models.query import QuerySet
from django.http import HttpRequest, StreamingHttpResponse

from proxy.models import UsageRecord

PIECE = 2000
"""Records that are read at once."""
FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet takes for the beginning of a formula, full-width forms included (R46)."""

Row = Sequence[object]


def download(
    request: HttpRequest, name: str, *, columns: Sequence[str], pieces: Iterator[Iterable[Row]]
) -> StreamingHttpResponse:
    """The answer that sends `pieces` of rows as the file `name` while they are made."""
    texts = _texts(columns, pieces)
    # Whoever serves asynchronously would first collect what is made synchronously.
    body: Any = _aside(texts) if isinstance(request, ASGIRequest) else texts
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingHttpResponse(body, content_type="text/csv; charset=utf-8", headers=headers)


def newest_first(records: QuerySet[UsageRecord]) -> Iterator[list[UsageRecord]]:
    """All of these records, a piece at a time. Each is a short query of its own: what is written meanwhile disturbs nobody."""
    records = records.order_by("-created_at", "-id")
    piece = list(records[:PIECE])
    while piece:
        last = piece[-1]
        yield piece
        before = Q(created_at__lt=last.created_at) | Q(id__lt=last.id)
        piece = list(records.filter(before, created_at__lte=last.created_at)[:PIECE])


def harmless(value: object) -> object:
    """The value of a cell: a text that a spreadsheet would calculate is marked as a text."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _texts(columns: Sequence[str], pieces: Iterator[Iterable[Row]]) -> Iterator[str]:
    yield _csv([columns])
    for piece in pieces:
        text = _csv(piece)
        # Whoever reads slowly must not keep a connection from others.
        if not connection.in_atomic_block:
            connection.close()
        if text:
            yield text


def _csv(rows: Iterable[Row]) -> str:
    out = io.StringIO()
    csv.writer(out).writerows([harmless(value) for value in row] for row in rows)
    return out.getvalue()


async def _aside(texts: Iterator[str]) -> AsyncIterator[str]:
    """The same from another thread, where the database may be waited for."""
    while (text := await sync_to_async(next)(texts, None)) is not None:
        yield text
