"""Prices through the API: dollars as text outside, whole nano-dollars inside, and nothing that rewrites history."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.utils import timezone

from audit.models import Entry
from providers.models import Provider
from proxy.models import ModelPrice
from proxy.models.prices import BEGINNING, MOST_RATE
from tests.support.api import V1, as_, error

pytestmark = pytest.mark.django_db
PATH = f"{V1}/prices"
BODY = {
    "provider": "openai",
    "model": "gpt-4o",
    "prompt_usd_per_million": "2.5",
    "completion_usd_per_million": "10",
}


@pytest.fixture
def listed() -> ModelPrice:
    """A price of the list, with a tier and an hour of the day, and the one before it."""
    values = {"source": "package", "vendor": "openai", "model": "gpt-4o", "completion": 0}
    hour: dict[str, Any] = {
        "from": 3600,
        "until": 7200,
        "prompt": 10**9,
        "completion": 2 * 10**9,
        "cached": None,
        "request": 0,
        "tiers": {},
    }
    rows = [
        ModelPrice(prompt=9, effective_from=BEGINNING, **values),
        ModelPrice(prompt=150_000_000, tiers={"prompt": [[200_000, 300_000_000]]}, hours=[hour], **values),
    ]
    ModelPrice.objects.bulk_create(rows)
    return ModelPrice.objects.get(prompt=150_000_000)


def make(user: User, **fields: Any) -> dict[str, Any]:
    response = as_(user).post(PATH, {**BODY, **fields})
    assert response.status_code == 201, response.content
    made: dict[str, Any] = response.json()
    return made


def test_an_override_is_written_in_dollars_and_kept_in_nano_dollars(operator: User) -> None:
    made = make(operator, cached_usd_per_million="0.000000001", request_usd="0.01", note="our contract")
    row = ModelPrice.objects.get(pk=made["id"])

    assert (row.prompt, row.completion, row.cached, row.cache_write, row.request) == (
        2_500_000_000, 10_000_000_000, 1, None, 10_000_000,
    )  # fmt: skip
    assert (row.source, row.provider_id) == ("override", Provider.objects.get(slug="openai").pk)
    assert made["prompt_usd_per_million"] == "2.5" and made["cached_usd_per_million"] == "0.000000001"
    assert made["cache_write_usd_per_million"] is None
    assert (made["provider"], made["created_by"], made["is_current"], made["source"]) == (
        "openai", "operator", True, "override",
    )  # fmt: skip
    assert as_(operator).get(f"{PATH}/{made['id']}").json() == made


def test_what_was_said_is_in_the_audit_log(operator: User) -> None:
    made = make(operator)
    entry = Entry.objects.get(action="add_price")
    assert (entry.entity_id, entry.entity_name, entry.username) == (
        str(made["id"]),
        "openai/gpt-4o",
        "operator",
    )
    assert entry.changes["prompt"] == [None, 2_500_000_000]


def test_an_override_is_ended_and_stays(operator: User) -> None:
    client, made = as_(operator), make(operator)
    ended = client.post(f"{PATH}/{made['id']}/end")
    assert ended.status_code == 200
    assert ended.json()["effective_until"] is not None and ended.json()["is_current"] is False
    assert client.get(f"{PATH}/{made['id']}").status_code == 200
    assert error(client.post(f"{PATH}/{made['id']}/end"))["code"] == "CONFLICT"


def test_it_is_ended_only_as_it_was_read(operator: User) -> None:
    client, made = as_(operator), make(operator)
    assert client.post(f"{PATH}/{made['id']}/end", headers={"if-match": '"9"'}).status_code == 412
    tag = client.get(f"{PATH}/{made['id']}")["ETag"]
    ended = client.post(f"{PATH}/{made['id']}/end", headers={"if-match": tag})
    assert ended.status_code == 200 and ended["ETag"] != tag


def test_a_price_of_the_list_is_not_ended(operator: User, listed: ModelPrice) -> None:
    response = as_(operator).post(f"{PATH}/{listed.pk}/end")
    assert response.status_code == 409 and "override" in error(response)["message"]


@pytest.mark.parametrize("method", ["put", "patch", "delete"])
def test_nobody_changes_or_deletes_a_price(owner: User, listed: ModelPrice, method: str) -> None:
    assert getattr(as_(owner), method)(f"{PATH}/{listed.pk}").status_code == 405


def test_tiers_hours_and_what_holds_now_are_told(viewer: User, listed: ModelPrice) -> None:
    found = as_(viewer).get(PATH, {"current": "true"}).json()["results"]
    assert [each["id"] for each in found] == [listed.pk]
    (told,) = found
    assert told["tiers"] == {"prompt": [{"above_tokens": 200_000, "usd_per_million": "0.3"}]}
    assert told["hours"][0]["from"] == "01:00:00" and told["hours"][0]["prompt_usd_per_million"] == "1"
    assert as_(viewer).get(PATH).json()["count"] == 2


def test_a_list_is_searched_and_filtered(operator: User, listed: ModelPrice) -> None:
    made, client = make(operator, model="o9*"), as_(operator)
    for query, ids in (
        ({"search": "o9"}, [made["id"]]),
        ({"source": "override"}, [made["id"]]),
        ({"provider": "openai"}, [made["id"]]),
        ({"vendor": "openai", "current": "true"}, [listed.pk]),
        ({"current": "false"}, [listed.pk - 1]),
    ):
        assert [each["id"] for each in client.get(PATH, query).json()["results"]] == ids, query


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prompt_usd_per_million": "-1"}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": "NaN"}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": "Infinity"}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": "0.0000000001"}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": "1000001"}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": True}, "prompt_usd_per_million"),
        ({"prompt_usd_per_million": None}, "prompt_usd_per_million"),
        ({"request_usd": "x"}, "request_usd"),
        ({"provider": "nobody"}, "provider"),
        ({"provider": 2**70}, "provider"),
        ({"model": ""}, "model"),
        ({"effective_from": "2020-01-01T00:00:00Z"}, "effective_from"),
        ({"effective_until": "2020-01-01T00:00:00Z"}, "effective_until"),
        ({"tiers": {}}, "tiers"),
        ({"source": "package"}, "source"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_a_price_is_named(operator: User, fields: dict[str, Any], wrong: str) -> None:
    response = as_(operator).post(PATH, {**BODY, **fields})
    assert response.status_code == 400
    assert set(error(response)["details"]) == {wrong}
    assert not ModelPrice.objects.exists()


def test_the_dearest_price_there_may_be_is_taken(operator: User) -> None:
    made = make(operator, prompt_usd_per_million="1000000")
    assert ModelPrice.objects.get(pk=made["id"]).prompt == MOST_RATE


def test_one_to_come_has_its_dates(operator: User) -> None:
    begin = timezone.now() + timedelta(days=1)
    made = make(
        operator, effective_from=begin.isoformat(), effective_until=(begin + timedelta(days=1)).isoformat()
    )
    assert made["is_current"] is False


def test_the_answer_says_where_it_ends_when_another_one_is_to_come(operator: User) -> None:
    begin = timezone.now() + timedelta(days=30)
    to_come = make(operator, effective_from=begin.isoformat())
    made = make(operator)
    assert made["effective_until"] == to_come["effective_from"]
    assert as_(operator).get(f"{PATH}/{to_come['id']}").json()["effective_until"] is None


def test_a_viewer_reads_and_no_more(viewer: User, listed: ModelPrice) -> None:
    client = as_(viewer)
    assert client.get(f"{PATH}/{listed.pk}").status_code == 200
    assert client.post(PATH, BODY).status_code == 403
    assert client.post(f"{PATH}/{listed.pk}/end").status_code == 403
