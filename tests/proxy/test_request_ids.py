"""The id of a request on its way: in the log lines of the data plane, and at the provider."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from typing import Any

import httpx
import orjson
import pytest

from config.logs import configuration
from tests.support import faults
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

HELLO = {"messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What our formatter makes of the log while the test runs."""
    made: dict[str, Any] = dict(configuration(level="INFO", style="json")["formatters"]["file"])
    handler = logging.StreamHandler(io.StringIO())
    handler.setFormatter(made.pop("()")(**made))
    logging.getLogger().addHandler(handler)
    yield handler.stream
    logging.getLogger().removeHandler(handler)


def ask(house: House, request_id: str) -> httpx.Response:
    headers = {"x-api-key": house.key, "x-request-id": request_id}
    return httpx.post(f"{house.url}/v1/chat/completions", json=HELLO, headers=headers, timeout=30)


def test_every_log_line_of_a_request_has_its_id(pair: House, upstream: Upstream, lines: io.StringIO) -> None:
    upstream.behave(faults.redirect(302, "https://elsewhere.example/steal"))
    for name in ("one", "two"):
        ask(pair, name)

    events = [orjson.loads(line) for line in lines.getvalue().splitlines()]
    redirects = [event["request_id"] for event in events if event["message"] == "upstream_redirect"]
    assert redirects == ["one", "two"]


def test_the_provider_is_told_the_id_that_the_caller_is_told(pair: House, upstream: Upstream) -> None:
    answers = [ask(pair, "mine"), ask(pair, pair.key), ask(pair, "not well-formed")]

    told = [asked.headers["x-request-id"] for asked in upstream.ledger.asked]
    assert told == [answer.headers["x-request-id"] for answer in answers]
    assert told[0] == "mine"
    assert all(len(each) == 32 and each.isalnum() for each in told[1:])


def test_a_header_that_the_administrator_chose_wins(house: House, upstream: Upstream) -> None:
    number = house.provide("first", f"{upstream.url}/v1", headers=(("X-Request-Id", "chosen"),))
    house.activate((number, "tiny"))

    ask(house, "mine")

    assert upstream.ledger.asked[0].headers["x-request-id"] == "chosen"
