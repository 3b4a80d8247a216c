"""The usage report and the list of usage, as pages of the admin."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from audit.changes import changes
from proxy.admin import report
from tests.proxy.test_admin_usage import text_of
from tests.proxy.test_usage_hours import a_row, book

pytestmark = pytest.mark.django_db
REPORT = "/admin/proxy/usagerecord/report/"


def page_of(person: User, address: str = REPORT, **asked: str) -> str:
    client = Client()
    client.force_login(person)
    answer = client.get(address, asked)
    assert answer.status_code == 200
    return answer.content.decode()


def rows_of(page: str) -> list[list[str]]:
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    rows = re.findall(r"<tr>.*?</tr>", body, re.DOTALL)
    return [[text_of(cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)] for row in rows]


def test_the_report_shows_what_a_period_comes_to(viewer: User) -> None:
    now = timezone.now()
    book(
        a_row(at=now, cost_nanodollars=2_500_000_000, model="big"),
        a_row(at=now, cost_nanodollars=500_000, status="error", ttft_ms=None),
        a_row(at=now, attempt=2, tokens_source="estimated"),
        a_row(at=now - timedelta(days=9), cost_nanodollars=10**9),
    )
    page = page_of(viewer, period="7d", group="model")
    assert rows_of(page) == [
        ["big", "", "1", "0", "5", "9", "$2.50"],
        ["tiny", "", "1", "1", "10", "18", "$0.000500 incomplete"],
    ]
    assert "width: 100.0%" in page and "width: 0.0%" in page
    text = text_of(page)
    assert "All times are UTC" in text
    assert "cost incomplete The price of 1 attempt is not known" in text
    assert "tokens of 1 attempt are our own estimate" in text


def test_where_nothing_has_a_price_bars_are_tokens_and_the_cost_is_unknown(viewer: User) -> None:
    now = timezone.now()
    book(a_row(at=now), a_row(at=now, model="big", prompt_tokens=19))
    page = page_of(viewer, group="model")
    assert {(row[0], row[-1]) for row in rows_of(page)} == {("big", "unknown"), ("tiny", "unknown")}
    assert "Share of tokens" in page and "width: 100.0%" in page and "width: 50.0%" in page


@pytest.mark.parametrize("group", report.GROUPS)
def test_it_can_be_told_apart_by(viewer: User, group: str) -> None:
    book(
        a_row(at=timezone.now(), owner="mia"),
        a_row(at=timezone.now() - timedelta(days=1), owner="max", gateway_key="b"),
    )
    assert rows_of(page_of(viewer, group=group, period="7d"))


def test_the_newest_day_is_on_top(viewer: User) -> None:
    now = timezone.now()
    book(a_row(at=now), a_row(at=now - timedelta(days=3)))
    days = [row[0] for row in rows_of(page_of(viewer, period="7d"))]
    assert days == [f"{now:%Y-%m-%d}", f"{now - timedelta(days=3):%Y-%m-%d}"]


def test_without_usage_it_says_so(viewer: User) -> None:
    page = page_of(viewer)
    assert "No usage in this period" in page and rows_of(page) == []


def test_what_an_address_names_wrongly_is_the_default(viewer: User) -> None:
    page = page_of(viewer, period="<b>", group="colour")
    assert "<b>" not in page
    assert '<option value="30d" selected>' in page and '<option value="day" selected>' in page


def test_more_lines_than_anybody_reads_are_left_to_the_csv(
    viewer: User, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "MOST_LINES", 1)
    book(a_row(at=timezone.now()), a_row(at=timezone.now(), model="big"))
    page = page_of(viewer, group="model")
    assert "more than 1 lines" in page and rows_of(page) == []


def test_its_csv_is_about_the_same_period(viewer: User) -> None:
    book(a_row(at=timezone.now()), a_row(at=timezone.now() - timedelta(days=2)))
    link = re.search(r'href="([^"]*format=csv[^"]*)"', page_of(viewer, period="24h", group="key"))
    assert link is not None and "/usage/summary?" in link[1]
    client = Client()
    client.force_login(viewer)
    answer: Any = client.get(link[1].replace("&amp;", "&"))
    lines = answer.getvalue().decode().splitlines()
    assert [line.split(",")[:3] for line in lines] == [["key_id", "key", "requests"], ["7", "shop", "1"]]


def test_whoever_may_not_see_usage_does_not_see_the_report(stranger: User) -> None:
    client = Client()
    client.force_login(stranger)
    assert client.get(REPORT).status_code == 302
    with changes(actor=None, via="system"):
        stranger.is_staff = True
        stranger.save()
    assert client.get(REPORT).status_code == 403


def test_the_start_page_leads_to_it(viewer: User) -> None:
    assert "None yet" in page_of(viewer, "/admin/")
    book(a_row(at=timezone.now(), cost_nanodollars=10**9))
    page = page_of(viewer, "/admin/")
    assert f'href="{REPORT}"' in page and "$1.00" in page


def test_hostile_names_are_only_text(viewer: User) -> None:
    book(a_row(at=timezone.now(), model="<script>alert(1)</script>"))
    page = page_of(viewer, group="model")
    assert "<script>alert" not in page and rows_of(page)[0][0] == "<script>alert(1)</script>"


# -- the list


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"a", "b", "c"}),
        ({"gateway_key": "shop"}, {"a", "b"}),
        ({"gateway_key": "8"}, {"c"}),
        ({"provider": "local"}, {"a", "b", "c"}),
        ({"provider": "4"}, set()),
        ({"model": "big"}, {"b"}),
        ({"owner": "mia"}, {"c"}),
        ({"status__exact": "error"}, {"a"}),
        ({"created_at_from": "2026-09-21", "created_at_to": "2026-09-21"}, {"a", "b"}),
        ({"created_at_to": "2026-09-20"}, {"c"}),
        ({"created_at_from": "yesterday"}, {"a", "b", "c"}),
        ({"q": "b"}, {"b"}),
        ({"gateway_key": "x\0y"}, set()),
    ],
)
def test_the_list_is_filtered_by(viewer: User, asked: dict[str, str], found: set[str]) -> None:
    from tests.proxy.test_usage_hours import AT

    book(
        a_row(request_id="a", status="error"),
        a_row(request_id="b", model="big"),
        a_row(request_id="c", owner="mia", gateway_key="app", gateway_key_id=8, at=AT - timedelta(days=1)),
    )
    client = Client()
    client.force_login(viewer)
    answer = client.get(reverse("admin:proxy_usagerecord_changelist"), asked)
    assert answer.status_code == 200
    assert {record.request_id for record in answer.context["cl"].result_list} == found
