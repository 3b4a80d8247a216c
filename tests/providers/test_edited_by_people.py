"""What people wrote stays, and a first key means the same wherever it is entered."""

from __future__ import annotations

import pytest
from django.contrib.auth.models import User

from audit.changes import changes
from providers import catalog, keys
from providers.models import ApiKey, Provider, UpstreamModel
from providers.wire import Model
from tests.support import answers
from tests.support.api import KEY, V1, add_server, as_
from tests.support.upstream import Upstream

pytestmark = pytest.mark.django_db


@pytest.fixture
def found(operator: User) -> UpstreamModel:
    """A model that a server listed, with a window of 4096."""
    made = add_server(as_(operator))
    with changes(actor=None, via="system"):
        catalog.save_models(Provider.objects.get(pk=made["id"]), [Model("tiny", context_window=4096)])
    return UpstreamModel.objects.get(name="tiny")


def refresh(model: UpstreamModel) -> UpstreamModel:
    with changes(actor=None, via="system"):
        catalog.save_models(model.provider, [Model("tiny", context_window=4096)])
    model.refresh_from_db()
    return model


def test_a_found_model_that_was_edited_in_the_api_is_not_overwritten(
    found: UpstreamModel, operator: User
) -> None:
    body = {"models": [{"id": "tiny", "context_window": 32768}]}
    assert as_(operator).patch(f"{V1}/servers/{found.provider_id}", body).status_code == 200
    model = refresh(found)
    assert (model.source, model.context_window) == ("manual", 32768)


def test_a_found_model_that_was_edited_in_the_admin_is_not_overwritten(
    found: UpstreamModel, operator: User
) -> None:
    form = {"enabled": "on", "context_window": "32768", "dimensions": "", "capabilities": ""}
    answer = as_(operator).post(
        f"/admin/providers/upstreammodel/{found.pk}/change/", form, format="multipart"
    )
    assert answer.status_code == 302, answer.content
    model = refresh(found)
    assert (model.source, model.context_window) == ("manual", 32768)


def test_a_found_model_that_was_only_listed_again_stays_found(found: UpstreamModel, operator: User) -> None:
    assert as_(operator).patch(f"{V1}/servers/{found.provider_id}", {"models": ["tiny"]}).status_code == 200
    assert refresh(found).source == "discovered"


@pytest.mark.parametrize("way", ["add", "write_default", "api"])
def test_a_vendors_first_key_enables_it_whichever_way_it_comes(way: str, operator: User) -> None:
    vendor = Provider.objects.get(slug="openai")
    assert not vendor.enabled
    with changes(actor=None, via="system"):
        if way == "add":
            keys.add(ApiKey(provider=vendor, name="first"), KEY)
        elif way == "write_default":
            keys.write_default(vendor, KEY)
    if way == "api":
        assert as_(operator).patch(f"{V1}/providers/{vendor.pk}", {"api_key": KEY}).status_code == 200
    stored = Provider.objects.get(slug="openai")
    assert stored.enabled and stored.keys.get().is_default


def test_a_first_key_that_comes_with_enabled_false_does_not_enable(operator: User) -> None:
    vendor = Provider.objects.get(slug="openai")
    answer = as_(operator).patch(f"{V1}/providers/{vendor.pk}", {"api_key": KEY, "enabled": False})
    assert answer.json()["enabled"] is False


def test_the_models_of_a_provider_are_asked_for_anew(
    operator: User, viewer: User, upstream: Upstream
) -> None:
    made = add_server(as_(operator), kind="openai-compatible", base_url=f"{upstream.url}/v1", models=["mine"])
    path = f"{V1}/providers/{made['id']}/models"
    assert as_(viewer).post(f"{path}/refresh").status_code == 403
    answer = as_(operator).post(f"{path}/refresh").json()
    assert {model["id"] for model in answer["models"]} == {"mine", *answers.MODELS}
    assert answer["cached"] is False and answer["fetched_at"]
    assert as_(viewer).get(path).json()["cached"] is True
