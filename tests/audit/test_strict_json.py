"""JSON of strangers is read by two parsers, of which the quick one is believed only where it is as strict as the other."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from audit import strict_json
from audit.strict_json import UNSURE, StrictJSONError

pytestmark = pytest.mark.no_database

texts = st.text(st.sampled_from('ab"\\\u0000 :,{}[]\ud83d\ude00é\n/'), max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from([2**63, -(2**63) - 1, 2**64, 1e300])
)


def written(draw: st.DrawFn, value: Any) -> str:
    """JSON of `value`, with keys that may stand twice and spaces wherever they may be."""
    space = draw(st.sampled_from(["", " ", "\n"]))
    if isinstance(value, list):
        return f"[{space}{f'{space},'.join(written(draw, each) for each in value)}]"
    if isinstance(value, tuple):
        pairs = (f"{written(draw, name)}{space}:{space}{written(draw, each)}" for name, each in value)
        return f"{{{','.join(pairs)}{space}}}"
    return json.dumps(value, ensure_ascii=draw(st.booleans()))


@st.composite
def documents(draw: st.DrawFn) -> bytes:
    pairs = st.lists(st.tuples(texts, st.deferred(lambda: values)), max_size=4).map(tuple)
    values: st.SearchStrategy[Any] = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.lists(st.tuples(texts, inner), max_size=4).map(tuple),
        max_leaves=12,
    )
    return written(draw, draw(values | pairs)).encode("utf-8", "surrogatepass")


def outcome(body: bytes) -> str:
    try:
        return repr(strict_json.loads(body))
    except StrictJSONError as error:
        return str(error)


@given(documents() | st.binary(max_size=20))
@example(b'{"a":1,"\\u0061":2}')
@example(b'{"a":"\\"","a":1}')
@example(b'{"a\\\\":1,"a\\\\":2,"b":"\\""}')
@example(b'{"a":18446744073709551616}')
@example(b'{"a":-9223372036854775809}')
@example(b"-0")
@example(b'["\\ud83d"]')
@example(b'\xef\xbb\xbf{"a":1}')
def test_both_parsers_come_to_the_same(body: bytes) -> None:
    told = outcome(body)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(strict_json, "_quickly", lambda body: UNSURE)
        assert told == outcome(body)


@pytest.mark.parametrize("text", ["river " * 20_000, 'he said "no"\n' * 100, "é😀" * 1000])
def test_a_long_prompt_is_read_quickly(text: str) -> None:
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": text}], "n": 1}).encode()
    assert strict_json._quickly(body) == json.loads(body)


@pytest.mark.parametrize(
    "body",
    [b'{"a":1,"a":1}', b'{"a":[],"a":[]}', b"[18446744073709551616]", json.dumps(list(range(3000))).encode()],
)
def test_what_the_quick_parser_may_have_got_wrong_is_not_believed(body: bytes) -> None:
    assert strict_json._quickly(body) is UNSURE
