"""The hash chain: any difference in what is hashed makes another hash, on every machine the same."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest

from audit import chain
from audit.models import Entry

WHEN = datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def entry(**fields: Any) -> Entry:
    return Entry(
        **{
            "seq": 7,
            "timestamp": WHEN,
            "action": "update_server",
            "entity_type": "ai_server",
            "entity_id": "3",
            "entity_name": "llama",
            "user_id": 1,
            "username": "operator",
            "via": "api",
            "ip": "192.0.2.1",
            "request_id": "r-1",
            "changes": {"name": ["a", "b"], "enabled": [True, False]},
            **fields,
        }
    )


def test_the_hash_of_an_entry_never_changes_between_versions() -> None:
    """An installation's log is verified for years: a change here would make every stored entry look edited."""
    assert (
        chain.link(chain.GENESIS, entry())
        == "710595ac99f66269fdfacd0e7b3723a69171ad68224dd93ed26c4817304c10ef"
    )


@pytest.mark.parametrize(
    "field",
    [
        {"seq": 8},
        {"timestamp": WHEN + timedelta(microseconds=1)},
        {"action": "delete_server"},
        {"entity_type": "provider"},
        {"entity_id": "4"},
        {"entity_name": "lama"},
        {"user_id": None},
        {"username": "owner"},
        {"via": "admin"},
        {"ip": None},
        {"request_id": ""},
        {"changes": {"name": ["a", "c"], "enabled": [True, False]}},
        {"changes": {"name": ["a", "b"], "enabled": [1, 0]}},
    ],
)
def test_every_field_counts(field: dict[str, Any]) -> None:
    assert chain.link(chain.GENESIS, entry(**field)) != chain.link(chain.GENESIS, entry())


def test_what_came_before_counts() -> None:
    assert chain.link("1" * 64, entry()) != chain.link(chain.GENESIS, entry())


def test_neither_the_order_of_keys_nor_the_time_zone_counts() -> None:
    elsewhere = WHEN.astimezone(timezone(timedelta(hours=5, minutes=30)))
    turned = {"enabled": [True, False], "name": ["a", "b"]}
    assert chain.link(chain.GENESIS, entry(timestamp=elsewhere, changes=turned)) == chain.link(
        chain.GENESIS, entry()
    )


def test_text_cannot_pass_for_the_border_of_another_field() -> None:
    one = entry(action='a","entity_id":"x', entity_id="3")
    other = entry(action="a", entity_id='x","entity_id":"3')
    assert chain.link(chain.GENESIS, one) != chain.link(chain.GENESIS, other)


def test_all_that_an_entry_says_is_hashed() -> None:
    columns = {field.name for field in Entry._meta.concrete_fields}
    assert columns - set(chain.FIELDS) == {"hash"}


@pytest.mark.parametrize(
    ("value", "kept"),
    [
        (1e16, "10000000000000000"),
        (-1.5e23, "-150000000000000000000000"),
        (123456789012345678.0, "123456789012345680"),
        (9999999999999998.0, "9999999999999998.0"),
        (-0.0, "0.0"),
        (1.0, "1.0"),
        (1e-320, "1e-320"),
        (0, "0"),
        (True, "True"),
        ({"a": [(-0.0, None)]}, "{'a': [[0.0, None]]}"),
    ],
)
def test_a_number_is_recorded_as_every_database_gives_it_back(value: Any, kept: str) -> None:
    assert repr(chain.storable(value)) == kept
