"""Usage through the API: what was recorded, what it comes to, who may see it, and as CSV."""

from __future__ import annotations

import asyncio
import csv
import io
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from asgiref.sync import sync_to_async
from django.contrib.auth.models import User
from django.core.asgi import get_asgi_application
from django.test import AsyncClient
from django.utils import timezone
from rest_framework.test import APIClient

from audit.api import Counted
from audit.changes import changes
from providers.models import Provider
from proxy import exports
from proxy.api import usage as api
from proxy.keys import give_secret
from proxy.models import GatewayKey, UsageHour
from tests.proxy.test_usage_hours import AT, HOUR, a_row, book
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/usage"
SUMMARY = f"{PATH}/summary"


def a_key(name: str, owner: User | None = None) -> GatewayKey:
    with changes(actor=None, via="system"):
        key = GatewayKey(name=name, owner=owner)
        give_secret(key)
        key.save()
    return key


def of(key: GatewayKey) -> dict[str, Any]:
    return {
        "gateway_key_id": key.pk,
        "gateway_key": key.name,
        "owner": key.owner.username if key.owner else "",
    }


def results(client: APIClient, **asked: Any) -> list[dict[str, Any]]:
    answer = client.get(PATH, asked)
    assert answer.status_code == 200, answer.content
    found: list[dict[str, Any]] = answer.json()["results"]
    return found


def summary(client: APIClient, **asked: Any) -> dict[str, Any]:
    answer = client.get(SUMMARY, {"since": "2026-09-01", "until": "2026-11-01", **asked})
    assert answer.status_code == 200, answer.content
    found: dict[str, Any] = answer.json()
    return found


def table(answer: Any) -> list[list[str]]:
    assert (answer.status_code, answer["content-type"]) == (200, "text/csv; charset=utf-8")
    return list(csv.reader(io.StringIO(answer.getvalue().decode())))


# -- records


def test_a_record_has_the_fields_that_were_promised_and_no_others(viewer: User) -> None:
    row = a_row(cost_nanodollars=1_234, trace=["a"], owner="mia", api_key_id=4)
    book(row)
    (shown,) = results(as_(viewer))
    assert shown == {
        "id": str(row["id"]), "request_id": "req-1", "attempt": 1, "created_at": "2026-09-21T14:59:59Z", "gateway_key": "shop",
        "owner": "mia", "route": "active:chat", "provider": "local", "api_key": 4, "requested_model": "auto", "model": "tiny",
        "purpose": "chat", "status": "success", "error_code": "", "prompt_tokens": 5, "completion_tokens": 9, "total_tokens": 14,
        "cached_tokens": 0, "cache_write_tokens": 0, "reasoning_tokens": 0, "tokens_source": "provider",
        "cost_usd": "0.000001234", "price_id": None, "ttft_ms": 12, "duration_ms": 340, "bytes_out": 4096, "stream": True,
        "client_disconnected": False, "trace": ["a"],
    }  # fmt: skip
    assert UUID(shown["id"]).version == 7
    assert as_(viewer).get(f"{PATH}/{shown['id']}").json() == shown


def test_a_cost_that_is_not_known_is_null_and_one_of_nothing_is_not(viewer: User) -> None:
    book(a_row(cost_nanodollars=0), a_row(at=HOUR))
    assert [row["cost_usd"] for row in results(as_(viewer))] == ["0.000000000", None]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"gateway_key": "shop"}, "abc"),
        ({"gateway_key": "7"}, "abc"),
        ({"owner": "mia"}, "b"),
        ({"provider": "local"}, "abd"),
        ({"provider": "3"}, "abd"),
        ({"model": "tiny", "gateway_key": "8"}, "d"),
        ({"status": "error"}, "c"),
        ({"since": "2026-09-21T14:59:59Z"}, "a"),
        ({"since": "2026-09-21T20:29:59+05:30"}, "a"),
        ({"until": "2026-09-21T14:59:59Z"}, "bcd"),
        ({"since": "2026-09-21", "until": "2026-09-22"}, "abcd"),
        ({"until": "2026-09-21"}, ""),
        ({"since": "2026-09-21T14:58:58", "until": "2026-09-21T14:59:00"}, "b"),
        ({}, "abcd"),
    ],
)
def test_records_are_found_by_what_they_are(viewer: User, asked: dict[str, str], found: str) -> None:
    def before(seconds: int) -> datetime:
        return AT - timedelta(seconds=seconds)

    book(
        a_row(request_id="a"),
        a_row(request_id="b", at=before(60), owner="mia"),
        a_row(request_id="c", at=before(120), status="error", provider="other", provider_id=4),
        a_row(request_id="d", at=before(180), gateway_key="app", gateway_key_id=8),
    )
    assert "".join(row["request_id"] for row in results(as_(viewer), **asked)) == found


def test_a_key_that_was_renamed_is_found_with_all_its_records(viewer: User) -> None:
    key = a_key("shop")
    book(
        a_row(**of(key)),
        a_row(**{**of(key), "gateway_key": "its old name"}),
        a_row(gateway_key="shop", gateway_key_id=99),
    )
    assert len(results(as_(viewer), gateway_key="shop")) == 2
    assert len(results(as_(viewer), gateway_key="its old name")) == 1


@pytest.mark.parametrize(
    ("ordering", "found"),
    [
        ("created_at", "cba"),
        ("-created_at", "abc"),
        ("cost_usd", "acb"),
        ("-cost_usd", "cab"),
        ("-total_tokens", "bac"),
        ("duration_ms", "bca"),
        ("-ttft_ms", "abc"),
    ],
)
def test_records_are_ordered_and_what_is_unknown_comes_last(viewer: User, ordering: str, found: str) -> None:
    book(
        a_row(request_id="a", cost_nanodollars=1, ttft_ms=3, duration_ms=9),
        a_row(request_id="b", at=AT - timedelta(1), prompt_tokens=100, ttft_ms=2, duration_ms=1),
        a_row(
            request_id="c",
            at=AT - timedelta(2),
            cost_nanodollars=5,
            prompt_tokens=0,
            ttft_ms=None,
            duration_ms=5,
        ),
    )
    assert "".join(row["request_id"] for row in results(as_(viewer), ordering=ordering)) == found


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        *((path, wrong) for path in (PATH, SUMMARY) for wrong in (
            {"colour": "1"}, {"status": "wonderful"}, {"since": "yesterday"}, {"since": "2026-13-01"}, {"until": "0001-01-01"},
            {"since": "9999-12-31T23:59:59-14:00"}, {"format": "xml"}, {"owner": "a\0b"}, {"model": "x" * 256},
            {"until": "2026-01-01", "since": "2026-01-01"}, {"since": "2026-01-01T00:00:00+99:00"},
        )),
        (PATH, {"ordering": "trace"}),
        (PATH, {"page_size": "201"}),
        (PATH, {"group_by": "key"}),
        (SUMMARY, {"group_by": "key,colour"}),
        (SUMMARY, {"bucket": "minute"}),
        (SUMMARY, {"page": "1"}),
        (SUMMARY, {"ordering": "cost_usd"}),
    ],
)  # fmt: skip
def test_what_is_unknown_or_wrong_is_an_error_that_names_it(
    viewer: User, path: str, wrong: dict[str, str]
) -> None:
    answer = as_(viewer).get(path, wrong)
    assert answer.status_code == 400
    assert error(answer)["code"] == "VALIDATION_ERROR"
    assert next(iter(wrong)) in error(answer)["details"]


def test_a_filter_that_is_given_twice_is_an_error(viewer: User) -> None:
    assert "status" in error(as_(viewer).get(f"{PATH}?status=error&status=success"))["details"]


@pytest.mark.parametrize(
    "id", ["1", "nothing", "01990000-0000-7000-8000-00000000000", "01990000-0000-7000-8000-000000000009"]
)
def test_a_record_that_is_not_there_is_404(viewer: User, id: str) -> None:
    assert as_(viewer).get(f"{PATH}/{id}").status_code == 404


def test_usage_is_only_read(owner: User) -> None:
    book(row := a_row())
    for method in ("post", "put", "patch", "delete"):
        for path in (PATH, SUMMARY, f"{PATH}/{row['id']}"):
            assert getattr(as_(owner), method)(path, {}).status_code == 405


# -- how many


def test_the_count_is_exact_as_far_as_one_counts_and_then_an_estimate(
    viewer: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Counted, "EXACT", 3)
    book(*(a_row(at=AT + timedelta(hours=more)) for more in range(3)))
    first = as_(viewer).get(PATH, {"page_size": 2}).json()
    assert (first["count"], "count_estimated" in first, len(first["results"])) == (3, False, 2)

    book(*(a_row(at=AT + timedelta(hours=more)) for more in range(3, 5)), a_row(status="error"))
    # Sums of records that are gone do not count.
    UsageHour.objects.create(id=UUID(int=1), hour=HOUR - timedelta(days=9), attempts=1000)
    first = as_(viewer).get(PATH, {"page_size": 2}).json()
    assert (first["count"], first["count_estimated"]) == (6, True)
    last = as_(viewer).get(first["next"]).json()["next"]
    assert len(as_(viewer).get(last).json()["results"]) == 2
    asked: dict[str, str | float] = {"page_size": 2, "status": "success", "since": AT.isoformat()}
    some = as_(viewer).get(PATH, asked).json()
    assert (some["count"], some["count_estimated"]) == (5, True)
    few = as_(viewer).get(PATH, {"until": AT.isoformat()}).json()
    assert (few["count"], "count_estimated" in few) == (0, False)


# -- summaries


def test_a_summary_adds_up_a_period_and_what_one_wants_to_tell_apart(viewer: User) -> None:
    book(
        a_row(cost_nanodollars=1_500_000_000, tokens_source="estimated"),
        a_row(attempt=2, status="error", ttft_ms=None, duration_ms=None, completion_tokens=0),
        a_row(
            status="client_disconnected",
            cost_nanodollars=0,
            at=AT + timedelta(days=1),
            ttft_ms=15,
            cached_tokens=2,
        ),
        a_row(at=AT - timedelta(days=90)),
    )
    answer = summary(as_(viewer), group_by="provider,status")
    assert {name: value for name, value in answer.items() if name not in {"results", "totals"}} == {
        "since": "2026-09-01T00:00:00Z", "until": "2026-11-01T00:00:00Z", "time_zone": "UTC", "bucket": None,
        "group_by": ["provider", "status"],
    }  # fmt: skip
    assert [(row["provider_id"], row["provider"], row["status"], row["attempts"]) for row in answer["results"]] == [
        (3, "local", "success", 1), (3, "local", "client_disconnected", 1), (3, "local", "error", 1),
    ]  # fmt: skip
    assert answer["totals"] == {
        "requests": 2, "attempts": 3, "errors": 1, "prompt_tokens": 15, "completion_tokens": 18, "total_tokens": 33,
        "cached_tokens": 2, "cache_write_tokens": 0, "reasoning_tokens": 0, "cost_usd": "1.500000000", "unpriced": 1,
        "estimated": 1, "mean_duration_ms": 340, "mean_ttft_ms": 14,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("group", "names"),
    [
        ("key", {"key_id": 7, "key": "shop"}),
        ("owner", {"owner": "mia"}),
        ("provider", {"provider_id": 3, "provider": "local"}),
        ("api_key", {"api_key": None}),
        ("model", {"model": "tiny"}),
        ("route", {"route": "active:chat"}),
        ("purpose", {"purpose": "chat"}),
        ("status", {"status": "success"}),
    ],
)
def test_it_tells_apart_by(viewer: User, group: str, names: dict[str, Any]) -> None:
    other: Any = {"api_key": "api_key_id", "key": "gateway_key"}.get(group, group)
    book(
        a_row(owner="mia"),
        a_row(owner="mia"),
        a_row(**{"owner": "mia", other: 9 if group == "api_key" else "error"}),
    )
    rows = summary(as_(viewer), group_by=group)["results"]
    assert len(rows) == 2
    assert rows[0] | names == rows[0] and rows[0]["attempts"] == 2


def test_a_summary_is_a_line_for_each_hour_or_day_of_utc(viewer: User) -> None:
    book(a_row(), a_row(at=AT + timedelta(seconds=1)), a_row(at=AT + timedelta(hours=9, seconds=1)))
    by_hour = summary(as_(viewer), bucket="hour")["results"]
    assert [(row["bucket"], row["attempts"]) for row in by_hour] == [
        ("2026-09-21T14:00:00Z", 1), ("2026-09-21T15:00:00Z", 1), ("2026-09-22T00:00:00Z", 1),
    ]  # fmt: skip
    by_day = summary(as_(viewer), bucket="day", group_by="model")["results"]
    assert [(row["bucket"], row["model"], row["attempts"]) for row in by_day] == [
        ("2026-09-21T00:00:00Z", "tiny", 2), ("2026-09-22T00:00:00Z", "tiny", 1),
    ]  # fmt: skip


def test_a_period_is_moved_outwards_to_whole_hours_and_says_so(viewer: User) -> None:
    book(a_row(at=HOUR), a_row(at=AT), a_row(at=AT + timedelta(seconds=1)))
    answer = summary(as_(viewer), since="2026-09-21T20:15:00+05:30", until="2026-09-21T16:59:59.5+02:00")
    assert (answer["since"], answer["until"]) == ("2026-09-21T14:00:00Z", "2026-09-21T15:00:00Z")
    assert answer["totals"]["attempts"] == 2
    assert summary(as_(viewer), until="2026-09-21T15:00:00Z")["until"] == "2026-09-21T15:00:00Z"


def test_without_a_period_it_is_about_the_last_thirty_days(viewer: User) -> None:
    now = timezone.now()
    book(a_row(at=now), a_row(at=now - timedelta(days=29)), a_row(at=now - timedelta(days=32)))
    assert as_(viewer).get(SUMMARY).json()["totals"]["attempts"] == 2


def test_a_period_without_usage_comes_to_nothing(viewer: User) -> None:
    answer = summary(as_(viewer), group_by="key")
    assert answer["results"] == []
    assert (answer["totals"]["attempts"], answer["totals"]["cost_usd"]) == (0, "0.000000000")
    assert answer["totals"]["mean_ttft_ms"] is None


def test_filters_count_in_a_summary_too(viewer: User) -> None:
    book(a_row(), a_row(status="error"), a_row(gateway_key_id=8, gateway_key="app"))
    assert summary(as_(viewer), status="error")["totals"]["attempts"] == 1
    assert summary(as_(viewer), gateway_key="8")["totals"]["attempts"] == 1


def test_more_lines_than_one_answer_takes_are_an_error(viewer: User, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "MOST_LINES", 2)
    book(*(a_row(model=f"m{each}") for each in range(3)))
    asked = {"since": "2026-09-01", "until": "2026-10-01", "group_by": "model"}
    assert "group_by" in error(as_(viewer).get(SUMMARY, asked))["details"]
    assert len(table(as_(viewer).get(SUMMARY, {**asked, "format": "csv"}))) == 4


# -- whose


def test_a_member_sees_the_usage_of_his_own_keys_and_nothing_of_others(
    person: Callable[..., User], operator: User
) -> None:
    mia, max_ = person("mia", "member"), person("max", "member")
    mine, theirs = a_row(**of(a_key("mine", mia))), a_row(**of(a_key("theirs", max_)))
    # Somebody who once had the same name, and a key that is nobody's.
    book(mine, theirs, a_row(owner="mia", gateway_key_id=99), a_row(**of(a_key("nobody's"))))
    client = as_(mia)

    assert [row["id"] for row in results(client)] == [str(mine["id"])]
    assert client.get(PATH).json()["count"] == 1
    assert client.get(f"{PATH}/{mine['id']}").status_code == 200
    assert error(client.get(f"{PATH}/{theirs['id']}"))["code"] == "NOT_FOUND"
    assert results(client, gateway_key="theirs") == []
    answer = summary(client, group_by="key")
    assert [row["key"] for row in answer["results"]] == ["mine"]
    assert answer["totals"]["attempts"] == 1
    assert len(table(client.get(PATH, {"format": "csv"}))) == 2
    exported = table(client.get(SUMMARY, {"since": "2026-09-01", "format": "csv", "group_by": "key"}))
    assert [row[1] for row in exported] == ["key", "mine"]
    assert len(results(as_(operator))) == 4


def test_a_member_without_keys_sees_nothing(person: Callable[..., User]) -> None:
    book(a_row(), a_row(gateway_key_id=None, gateway_key=""))
    client = as_(person("mia", "member"))
    assert results(client) == []
    assert summary(client)["totals"]["attempts"] == 0


@pytest.mark.parametrize(
    "path", [PATH, SUMMARY, f"{PATH}?format=csv", f"{PATH}/01990000-0000-7000-8000-000000000001"]
)
def test_whoever_has_no_role_is_refused(stranger: User, path: str) -> None:
    assert as_(stranger).get(path).status_code == 403
    assert APIClient().get(path).status_code == 401


# -- CSV


def test_the_csv_of_records_has_all_of_them_however_many_pieces_it_takes(
    viewer: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exports, "PIECE", 3)
    # Of the same moment, so that only the id tells what comes next.
    rows = [a_row(request_id=str(each), at=AT if each < 7 else HOUR) for each in range(10)]
    book(*rows)
    answer = as_(viewer).get(PATH, {"format": "csv", "gateway_key": "shop"})
    assert answer["content-disposition"] == 'attachment; filename="usage.csv"'
    assert answer["cache-control"] == "no-store"
    head, *lines = table(answer)
    assert head[:4] == ["id", "request_id", "attempt", "created_at"] and "trace" not in head
    expected = sorted(rows, key=lambda row: (row["created_at"], row["id"]), reverse=True)
    assert [line[0] for line in lines] == [str(row["id"]) for row in expected]


def test_the_csv_of_a_summary_has_its_lines(viewer: User) -> None:
    book(a_row(cost_nanodollars=7), a_row(at=AT + timedelta(days=1)))
    asked = {
        "since": "2026-09-20",
        "until": "2026-09-25",
        "format": "csv",
        "bucket": "day",
        "group_by": "key",
    }
    head, *lines = table(as_(viewer).get(SUMMARY, asked))
    assert head[:5] == ["bucket", "key_id", "key", "requests", "attempts"]
    assert [line[:5] for line in lines] == [
        ["2026-09-21 00:00:00+00:00", "7", "shop", "1", "1"], ["2026-09-22 00:00:00+00:00", "7", "shop", "1", "1"],
    ]  # fmt: skip
    assert [line[head.index("cost_usd")] for line in lines] == ["0.000000007", "0.000000000"]
    hourly = table(as_(viewer).get(SUMMARY, {**asked, "bucket": "hour"}))
    assert len(hourly) == 3


@pytest.mark.parametrize("bucket", ["hour", "day"])
def test_hours_without_usage_cost_a_csv_nothing(
    viewer: User, bucket: str, django_assert_max_num_queries: Callable[[int], Any]
) -> None:
    book(a_row(), a_row(at=AT + timedelta(days=40)), a_row(at=AT + timedelta(days=40, hours=2)))
    asked = {"since": "2026-01-01", "until": "2028-01-01", "format": "csv", "bucket": bucket}
    with django_assert_max_num_queries(40):
        _, *lines = table(as_(viewer).get(SUMMARY, asked))
    assert [line[1] for line in lines] == (["1", "1", "1"] if bucket == "hour" else ["1", "2"])


@pytest.mark.parametrize("first", ["=", "+", "-", "@", "\t", "\r", "\n", "\uff1d"])
def test_r46_a_formula_is_only_a_text(viewer: User, first: str) -> None:
    evil = f'{first}HYPERLINK("http://x","y")'
    book(a_row(model=evil, owner=evil, request_id=evil))
    for path in (PATH, SUMMARY):
        asked = {
            "format": "csv",
            "since": "2026-09-01",
            **({"group_by": "owner,model"} if path == SUMMARY else {}),
        }
        cells = [cell for row in table(as_(viewer).get(path, asked)) for cell in row]
        assert f"'{evil}" in cells
        assert not [cell for cell in cells if cell.startswith(exports.FORMULA)]


@pytest.mark.django_db(transaction=True)
async def test_the_asynchronous_server_sends_a_csv_piece_by_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exports, "PIECE", 2)

    def prepare() -> User:
        book(*(a_row() for _ in range(5)))
        with changes(actor=None, via="system"):
            return User.objects.create_superuser("ada")

    client = AsyncClient()
    await client.aforce_login(await sync_to_async(prepare)(), "django.contrib.auth.backends.ModelBackend")
    answer: Any = await client.get(f"{PATH}?format=csv")
    pieces = [piece async for piece in answer.streaming_content]
    assert [piece.count(b"\r\n") for piece in pieces] == [1, 2, 2, 1]


@pytest.mark.django_db(transaction=True)
async def test_a_client_who_leaves_ends_a_csv() -> None:
    def prepare() -> User:
        book(*(a_row(at=AT + timedelta(hours=hour)) for hour in range(60)))
        with changes(actor=None, via="system"):
            return User.objects.create_superuser("ada")

    client = AsyncClient()
    await client.aforce_login(await sync_to_async(prepare)(), "django.contrib.auth.backends.ModelBackend")
    cookie = client.cookies.output(attrs=[], header="", sep=";").strip().encode()
    left, pieces = asyncio.Event(), []
    messages = iter([{"type": "http.request", "body": b""}])

    async def receive() -> dict[str, Any]:
        if (message := next(messages, None)) is not None:
            return message
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        pieces.append(message.get("body", b""))
        if len(pieces) == 5:
            left.set()

    query = b"format=csv&bucket=hour&since=2026-09-01&until=2999-01-01"
    scope = {
        "type": "http", "http_version": "1.1", "method": "GET", "path": SUMMARY, "query_string": query,
        "headers": [(b"host", b"testserver"), (b"cookie", cookie)], "scheme": "http",
    }  # fmt: skip
    await get_asgi_application()(scope, receive, send)
    assert b"bucket" in pieces[1] and 5 <= len(pieces) < 20


# -- names that are still there


def test_a_provider_is_found_by_its_slug_with_the_records_from_before_it_was_renamed(viewer: User) -> None:
    with changes(actor=None, via="system"):
        provider = Provider.objects.create(name="Box", slug="box", kind="vllm", base_url="http://localhost:1")
    book(a_row(provider_id=provider.pk, provider="box"), a_row(provider_id=provider.pk, provider="old-box"))
    assert len(results(as_(viewer), provider="box")) == 2
