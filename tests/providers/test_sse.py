"""Splitting a stream of server-sent events."""

from __future__ import annotations

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from providers import errors, sse

pytestmark = pytest.mark.no_database

LINE_ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
LINES = st.one_of(
    st.just(b"data: [DONE]"),
    st.just(b": keep-alive"),
    st.just(b"event: ping"),
    st.text(alphabet=st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=12).map(
        lambda text: b"data: " + text.encode()
    ),
)
PIECES = st.lists(st.one_of(LINES, LINE_ENDS, LINE_ENDS), max_size=40)


def meaning(block: bytes) -> list[tuple[bytes, bytes]]:
    return [(event.name, event.data) for event in sse.events(block) if event.data]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted(place % (len(stream) + 1) for place in places), len(stream)]
    return [stream[a:b] for a, b in itertools.pairwise(edges)]


@given(pieces=PIECES, places=st.lists(st.integers(0, 10_000), max_size=12))
def test_any_cutting_of_any_stream_gives_the_same_events(pieces: list[bytes], places: list[int]) -> None:
    stream = b"".join(pieces)
    splitter = sse.Splitter()
    out = [splitter.feed(part) for part in cut(stream, places)]
    assert b"".join(out) + splitter.tail == stream
    seen = [event for block in (*out, splitter.tail) for event in meaning(block)]
    assert seen == meaning(stream)


@given(stream=st.binary(max_size=300), places=st.lists(st.integers(0, 10_000), max_size=8))
def test_no_byte_is_lost_or_changed_whatever_an_upstream_sends(stream: bytes, places: list[int]) -> None:
    splitter = sse.Splitter()
    out = b"".join(splitter.feed(part) for part in cut(stream, places)) + splitter.tail
    assert out == stream
    assert b"".join(event.raw for event in sse.events(stream)) == stream


@pytest.mark.parametrize("end", [b"\n\n", b"\r\n\r\n", b"\r\r", b"\n\r\n", b"\r\n\n", b"\n\r", b"\r\n\r"])
def test_an_event_is_handed_on_as_soon_as_its_blank_line_is_there(end: bytes) -> None:
    splitter = sse.Splitter()
    stream = b"data: one" + end
    for index in range(len(stream) - 1):
        got = splitter.feed(stream[index : index + 1])
        if got:
            break
    else:
        got = splitter.feed(stream[-1:])
    assert meaning(got) == [(b"", b"one")]


def test_complete_events_go_out_without_a_copy() -> None:
    block = b"data: one\n\ndata: two\n\n"
    assert sse.Splitter().feed(block) is block


def test_the_beginning_of_the_next_event_is_kept() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"data: one\n\ndata: t") == b"data: one\n\n"
    assert splitter.tail == b"data: t"
    assert splitter.feed(b"wo\n") == b""
    assert splitter.feed(b"\n") == b"data: two\n\n"
    assert splitter.tail == b""


def test_the_unicode_line_separator_does_not_split() -> None:
    block = 'data: {"content": "a\u2028b\u2029c\x0bd\x85e"}\n\n'.encode()
    (event,) = sse.events(block)
    assert event.data == block[6:-2]


def test_data_lines_are_joined_and_the_name_is_read() -> None:
    (event,) = sse.events(b"event: message_start\r\ndata: {\r\ndata:  1}\r\nid: 4\r\n\r\n")
    assert event == (
        b"event: message_start\r\ndata: {\r\ndata:  1}\r\nid: 4\r\n\r\n",
        b"{\n 1}",
        b"message_start",
    )


def test_a_comment_is_no_data() -> None:
    keep_alive, chunk = sse.events(b": OPENROUTER PROCESSING\n\ndata: {}\n\n")
    assert keep_alive.is_comment
    assert not chunk.is_comment


def test_an_upstream_may_end_without_the_last_blank_line() -> None:
    splitter = sse.Splitter()
    assert splitter.feed(b"data: one\n\ndata: [DONE]") == b"data: one\n\n"
    assert meaning(splitter.tail) == [(b"", b"[DONE]")]


def test_a_byte_order_mark_before_the_first_event_is_no_content() -> None:
    assert meaning(b"\xef\xbb\xbfdata: one\n\n") == [(b"", b"one")]


def test_r30_a_line_without_an_end_is_refused_at_one_mebibyte() -> None:
    splitter = sse.Splitter()
    for _ in range(sse.MAX_EVENT_BYTES // 65_536):
        splitter.feed(b"x" * 65_536)
    with pytest.raises(errors.ProtocolError):
        splitter.feed(b"x")


@pytest.mark.parametrize("parts", [1, 40])
def test_r30_an_event_above_the_limit_is_refused_even_when_it_is_complete(parts: int) -> None:
    stream = b"data: ok\n\ndata: " + b"x" * sse.MAX_EVENT_BYTES + b"\n\ndata: ok\n\n"
    step = len(stream) // parts + 1
    splitter = sse.Splitter()
    with pytest.raises(errors.ProtocolError):
        list(map(splitter.feed, (stream[start : start + step] for start in range(0, len(stream), step))))


def test_many_events_in_one_read_are_no_long_event() -> None:
    block = (b"data: " + b"x" * 1000 + b"\r\n\r\n") * 2000
    assert sse.Splitter().feed(block) == block


def test_f10_a_byte_at_a_time_is_not_quadratic() -> None:
    splitter = sse.Splitter()
    splitter.feed(b"data: " + b"x" * (sse.MAX_EVENT_BYTES - 20_000))
    started = time.process_time()
    for _ in range(10_000):
        splitter.feed(b"y")
    assert time.process_time() - started < 0.5
