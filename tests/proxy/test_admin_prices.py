"""The pages of prices, and what people are told of those that are missing."""

from __future__ import annotations

import html
import uuid
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from audit.models import Entry
from providers.models import Provider
from proxy.models import ModelPrice, PriceList, UsageRecord
from proxy.models.prices import BEGINNING

pytestmark = pytest.mark.django_db
LIST, ADD = reverse("admin:proxy_modelprice_changelist"), reverse("admin:proxy_modelprice_add")


def logged_in(user: User) -> Client:
    client = Client()
    client.force_login(user)
    return client


@pytest.fixture
def listed() -> ModelPrice:
    values = {"source": "package", "vendor": "openai", "completion": 10_000_000_000, "model": "gpt-4o"}
    ModelPrice.objects.bulk_create(
        [
            ModelPrice(prompt=7_770_000_000, effective_from=BEGINNING, **values),
            ModelPrice(prompt=2_500_000_000, tiers={"prompt": [[200_000, 5_000_000_000]]}, **values),
        ]
    )
    return ModelPrice.objects.get(prompt=2_500_000_000)


def form_of(**fields: Any) -> dict[str, Any]:
    return {
        "provider_row": Provider.objects.get(slug="openai").pk, "model": "gpt-*", "prompt": "0.15", "completion": "0.6",
        "cached": "", "cache_write": "", "reasoning": "", "request": "", "note": "",
        "effective_from_0": "", "effective_from_1": "", "effective_until_0": "", "effective_until_1": "",
        **fields,
    }  # fmt: skip


def record(**fields: Any) -> UsageRecord:
    values = {
        "created_at": timezone.now(),
        "status": "success",
        "tokens_source": "provider",
        "model": "m",
        **fields,
    }
    return UsageRecord.objects.create(id=uuid.uuid4(), **values)


def test_the_list_shows_dollars_for_a_million_tokens_of_what_holds_now(
    viewer: User, listed: ModelPrice
) -> None:
    client = logged_in(viewer)
    page = client.get(LIST).content.decode()
    assert "$2.5+" in page and "$10" in page and "$7.77" not in page
    assert "Prompt / M" in page
    everything = client.get(LIST, {"state": "all"}).content.decode()
    assert "$7.77" in everything and "replaced" in everything
    assert "$2.5+" not in client.get(LIST, {"state": "history"}).content.decode()


def test_it_is_searched_and_filtered(viewer: User, listed: ModelPrice) -> None:
    client = logged_in(viewer)
    for query, count in (
        ({"q": "gpt-4"}, 1),
        ({"q": "claude"}, 0),
        ({"source__exact": "override"}, 0),
        ({"vendor__exact": "openai"}, 1),
    ):
        answer = client.get(LIST, query)
        assert answer.status_code == 200 and answer.context["cl"].result_count == count, query


def test_an_override_is_typed_in_dollars(operator: User, listed: ModelPrice) -> None:
    answer = logged_in(operator).post(ADD, form_of())
    assert answer.status_code == 302, answer.context["adminform"].form.errors
    row = ModelPrice.objects.get(source="override")
    assert (row.prompt, row.completion, row.cached, row.request) == (150_000_000, 600_000_000, None, 0)
    assert (row.provider, row.model, row.created_by) == ("openai", "gpt-*", "operator")
    assert Entry.objects.get(action="add_price").username == "operator"


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"prompt": "-1"}, "prompt"),
        ({"prompt": "cheap"}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"completion": "0.0000000001"}, "completion"),
        ({"provider_row": "99999"}, "provider_row"),
        ({"model": ""}, "model"),
        ({"effective_from_0": "2020-01-01", "effective_from_1": "00:00:00"}, "effective_from"),
    ],
)
def test_what_cannot_be_a_price_is_said_at_its_field(
    operator: User, fields: dict[str, Any], wrong: str
) -> None:
    answer = logged_in(operator).post(ADD, form_of(**fields))
    assert answer.status_code == 200
    assert wrong in answer.context["adminform"].form.errors
    assert not ModelPrice.objects.exists()


def test_a_price_is_shown_and_not_changed_or_deleted(owner: User, listed: ModelPrice) -> None:
    client = logged_in(owner)
    address = reverse("admin:proxy_modelprice_change", args=[listed.pk])
    page = html.unescape(client.get(address).content.decode())
    assert "prompt $5 above 200,000 tokens" in page
    assert 'name="_save"' not in page and f"{listed.pk}/end/" not in page
    assert client.post(address, form_of()).status_code == 403
    assert (
        client.post(reverse("admin:proxy_modelprice_delete", args=[listed.pk]), {"post": "yes"}).status_code
        == 403
    )
    assert ModelPrice.objects.get(pk=listed.pk).prompt == 2_500_000_000


def test_an_override_is_ended_after_a_question(operator: User) -> None:
    client = logged_in(operator)
    client.post(ADD, form_of())
    row = ModelPrice.objects.get()
    end = reverse("admin:proxy_modelprice_end", args=[row.pk])
    assert end in client.get(reverse("admin:proxy_modelprice_change", args=[row.pk])).content.decode()
    assert client.get(end).status_code == 200
    assert ModelPrice.objects.get().effective_until is None

    assert client.post(end).status_code == 302
    assert ModelPrice.objects.get().effective_until is not None
    assert client.post(end).status_code == 404


def test_a_viewer_writes_no_price(viewer: User, listed: ModelPrice) -> None:
    client = logged_in(viewer)
    assert client.get(ADD).status_code == 403
    assert client.post(ADD, form_of()).status_code == 403
    assert client.post(reverse("admin:proxy_modelprice_end", args=[listed.pk])).status_code == 403


def test_a_record_says_that_its_price_is_unknown_and_which_one_it_was_billed_by(
    viewer: User, listed: ModelPrice
) -> None:
    client = logged_in(viewer)
    unknown, billed = record(), record(cost_nanodollars=1_500_000, price_id=listed.pk)
    nothing = record(tokens_source="none", status="interrupted")

    def page(row: UsageRecord) -> str:
        return client.get(reverse("admin:proxy_usagerecord_change", args=[row.pk])).content.decode()

    assert unknown.unpriced and "price unknown" in page(unknown)
    assert "$0.001500" in page(billed)
    assert reverse("admin:proxy_modelprice_change", args=[listed.pk]) in page(billed)
    assert not nothing.unpriced and "price unknown" not in page(nothing)
    found = (
        client.get(reverse("admin:proxy_usagerecord_changelist"), {"price": "unknown"}).context["cl"].queryset
    )
    assert list(found) == [unknown]


def test_f47_the_start_page_says_what_had_no_price(viewer: User) -> None:
    client = logged_in(viewer)
    assert "no known price" not in client.get(reverse("admin:index")).content.decode()
    record(provider_id=1, model="a")
    record(provider_id=1, model="a")
    record(provider_id=2, model="a")
    record(created_at=timezone.now() - timedelta(days=2), model="old")
    record(cost_nanodollars=0, price_id=1, model="free")
    page = client.get(reverse("admin:index")).content.decode()
    assert "3 answers of 2 models had no known price" in page
    assert f"{reverse('admin:proxy_usagerecord_changelist')}?price=unknown" in page


def test_f47_the_start_page_says_that_the_list_is_broken(viewer: User) -> None:
    PriceList.objects.create(problem="ModuleNotFoundError: gone")
    page = logged_in(viewer).get(reverse("admin:index")).content.decode()
    assert "price list cannot be used" in page and "ModuleNotFoundError: gone" in page
