"""What people read about one request: who was asked, what came of it and how long it took, whatever the record holds."""

from __future__ import annotations

import html
import re
import uuid
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from proxy.admin.trace import LONGEST, MOST, way_of
from proxy.models import UsageRecord
from tests.support import answers
from tests.support.inprocess import House
from tests.support.upstream import Upstream

FIRST = {
    "to": "box/tiny", "key": None, "outcome": "upstream_timeout", "queue": 1, "connect": 3, "first_token": None, "total": 1003,
}  # fmt: skip
SECOND = {
    "to": "openai/gpt-4o", "key": "spare", "outcome": "success", "queue": 1005, "connect": 20, "first_token": 212, "total": 904,
}  # fmt: skip
CANDIDATES = [
    "old/tiny: down (connection refused)", "box/tiny: taken", "openai/gpt-4o: taken", "groq/x: limited, for 12 s more",
]  # fmt: skip
TRACE = {"candidates": CANDIDATES, "attempts": [FIRST, SECOND]}
HOSTILE = "<script>alert(1)</script>\"'{{7*7}}"


def page_of(person: User, trace: Any, **fields: Any) -> str:
    """The page of a record with this trace, as this person sees it."""
    values = {"created_at": timezone.now(), "status": "success", "request_id": "r-1", "attempt": 2, **fields}
    record = UsageRecord.objects.create(id=uuid.uuid4(), trace=trace, **values)
    client = Client()
    client.force_login(person)
    answer = client.get(reverse("admin:proxy_usagerecord_change", args=[record.pk]))
    assert answer.status_code == 200
    return answer.content.decode()


def card_of(page: str) -> str:
    return page.partition('aria-label="The way this request took"')[2].partition("</section>")[0]


def text_of(part: str) -> str:
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", part)).split())


def rows_of(page: str) -> list[list[str]]:
    body = card_of(page).partition("<tbody>")[2].partition("</tbody>")[0]
    return [
        [text_of(cell) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL)
    ]


def test_each_attempt_is_a_row_with_its_times(viewer: User) -> None:
    assert rows_of(page_of(viewer, TRACE)) == [
        ["1", "box/tiny", "-", "upstream_timeout", "1 ms", "3 ms", "-", "1003 ms"],
        ["2 this record", "openai/gpt-4o", "spare", "success", "1005 ms", "20 ms", "212 ms", "904 ms"],
    ]


def test_each_cell_says_what_it_is_where_there_is_no_room_for_headings(viewer: User) -> None:
    card = card_of(page_of(viewer, TRACE))
    headings = [text_of(each) for each in re.findall(r"<th .*?</th>", card)]
    assert re.findall(r'data-label="([^"]*)"', card) == headings * 2


def test_every_candidate_is_there_with_the_reason(viewer: User) -> None:
    items = re.findall(r"<li>.*?</li>", card_of(page_of(viewer, TRACE)), re.DOTALL)
    assert [text_of(item) for item in items] == [
        "old/tiny : down (connection refused)",
        "box/tiny taken",
        "openai/gpt-4o taken",
        "groq/x : limited, for 12 s more",
    ]


def test_it_leads_to_the_other_attempts_of_the_request(viewer: User) -> None:
    link = re.search(r'href="([^"]*)">the other records', page_of(viewer, TRACE, request_id="a&b=c%d"))
    assert link is not None
    client = Client()
    client.force_login(viewer)
    found = client.get(html.unescape(link[1])).context["cl"].queryset
    assert [record.request_id for record in found] == ["a&b=c%d"]
    assert "other records" not in page_of(viewer, TRACE, request_id="")


def test_the_raw_trace_is_not_shown_beside_it(viewer: User) -> None:
    page = page_of(viewer, TRACE)
    assert "first_token" not in page and "candidates" not in html.unescape(page)


@pytest.mark.parametrize(
    "trace", [CANDIDATES, {"trace": CANDIDATES, "usage_invalid": ["status"]}], ids=["alone", "with a fault"]
)
def test_the_lines_of_an_older_record_are_its_candidates(viewer: User, trace: Any) -> None:
    page = page_of(viewer, trace)
    assert "down (connection refused)" in page
    assert "attempts were not kept" in page and not rows_of(page)


def test_a_record_without_a_trace_says_so(viewer: User) -> None:
    assert "attempts were not kept" in card_of(page_of(viewer, None))


def test_values_that_were_not_usable_are_named(viewer: User) -> None:
    page = page_of(viewer, {**TRACE, "usage_invalid": ["ttft_ms", "bytes_out"]})
    assert "not to be relied on: ttft_ms, bytes_out." in page
    assert "relied on" not in page_of(viewer, TRACE)


@pytest.mark.parametrize(
    "trace",
    [
        [HOSTILE, f"{HOSTILE}: {HOSTILE}"],
        {"candidates": [HOSTILE], "attempts": [dict.fromkeys(FIRST, HOSTILE)], "usage_invalid": [HOSTILE]},
        {"candidates": HOSTILE, "attempts": HOSTILE, "usage_invalid": HOSTILE},
        {"candidates": {HOSTILE: HOSTILE}, "attempts": {HOSTILE: HOSTILE}, "usage_invalid": {HOSTILE: 1}},
        {
            "candidates": [[HOSTILE], {HOSTILE: [HOSTILE]}],
            "attempts": [[HOSTILE], None, {"to": {HOSTILE: 1}}],
        },
        HOSTILE,
    ],
    ids=["lines", "strings", "no lists", "objects", "nested", "a text"],
)
def test_hostile_text_is_only_text(viewer: User, trace: Any) -> None:
    page = page_of(viewer, trace, request_id=HOSTILE)
    assert "<script>alert" not in page
    assert "49" not in text_of(card_of(page)) and "alert(1)" in text_of(card_of(page))


@pytest.mark.parametrize("time", [True, "3 s", [], {}, None])
def test_a_time_that_is_no_number_is_not_known(time: object) -> None:
    way = way_of({"attempts": [{**FIRST, "total": time}]})
    assert dict(way.attempts[0].times)["Took"] == "-"


@pytest.mark.parametrize("trace", [None, [], {}, 7, True, "", [None], {"attempts": [1, None]}, {"trace": 3}])
def test_no_shape_of_a_trace_is_an_error(trace: object) -> None:
    assert way_of(trace).attempts == ()


def test_a_long_trace_is_shown_in_part() -> None:
    way = way_of({"candidates": ["x" * 10_000] * (MOST + 7), "attempts": [{"to": "y" * 10_000}]})
    assert (len(way.candidates), way.more, len(way.candidates[0][0])) == (MOST, 7, LONGEST)
    assert len(way.attempts[0].to) == LONGEST


def test_it_reads_what_workers_write(pair: House, upstream: Upstream) -> None:
    upstream.behave(answers.status(500))
    pair.ask("auto", stream=True)

    first, second = (way_of(record["trace"]) for record in pair.records(2))

    assert [tried.to for tried in first.attempts] == ["first/tiny"]
    assert [tried.to for tried in second.attempts] == ["first/tiny", "second/big"]
    assert [tried.key for tried in second.attempts] == ["default", "default"]
    assert "upstream_error" in second.attempts[0].outcome and "success" in second.attempts[1].outcome
    assert all(time.endswith(" ms") for _, time in second.attempts[1].times)
    assert second.candidates == (("first/tiny", "taken"), ("second/big", "taken"))
