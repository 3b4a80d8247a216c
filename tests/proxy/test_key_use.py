"""What keys have done so far: counted once, with the records, whatever comes twice."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.contrib.auth.models import User
from django.test import Client
from django.urls import reverse

from audit.changes import changes
from providers import keyring, keys
from providers.models import ApiKey, KeyUse, Provider, ProviderUse
from proxy import key_use, usage
from proxy.keys import give_secret
from proxy.models import GatewayKey, GatewayKeyUse, UsageRecord
from proxy.snapshot import build
from proxy.spool import Spool, new_attempt_id
from tests.proxy.test_usage_hours import a_row
from tests.support.api import V1, as_
from tests.support.inprocess import House
from tests.support.records import a_final, a_start

AT = 1_790_000_000_123

Attempt = Callable[..., str]


@pytest.fixture
def api_key(db: None) -> ApiKey:
    keyring.ensure()
    with changes(actor=None, via="system"):
        provider = Provider.objects.get(slug="openai")
        return keys.write_default(provider, "sk-counted-0123456789")


@pytest.fixture
def gateway_key(db: None) -> GatewayKey:
    with changes(actor=None, via="system"):
        key = GatewayKey(name="shop")
        give_secret(key)
        key.save()
    return key


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "spool"


@pytest.fixture
def attempt(directory: Path, api_key: ApiKey, gateway_key: GatewayKey) -> Attempt:
    """Leave the record of one attempt in a spool whose worker has ended; its id."""

    def leave(*, start: dict[str, Any] | None = None, **final: Any) -> str:
        spool, one = Spool(directory), new_attempt_id()
        ids = {"api_key_id": api_key.pk, "provider_id": api_key.provider_id, "gateway_key_id": gateway_key.pk}
        spool.start(a_start(one, **{**ids, **(start or {})}))
        spool.finish(a_final(one, **final))
        spool.close()
        return one

    return leave


def test_attempts_count_for_their_keys(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey
) -> None:
    attempt(prompt_tokens=5, completion_tokens=9)
    attempt(prompt_tokens=1, completion_tokens=1, start={"created_at": AT + 60_000})
    usage.drain(directory)
    attempt(prompt_tokens=100, completion_tokens=0, start={"created_at": AT - 60_000})
    usage.drain(directory)
    use, gateway_use = KeyUse.objects.get(api_key=api_key), GatewayKeyUse.objects.get(gateway_key=gateway_key)
    latest = datetime.fromtimestamp((AT + 60_000) / 1000, UTC)
    assert (use.requests_count, use.tokens_used, use.last_used_at) == (3, 116, latest)
    assert (gateway_use.requests_count, gateway_use.tokens_used, gateway_use.last_used_at) == (3, 116, latest)
    provider_use = ProviderUse.objects.get(provider=api_key.provider)
    assert (provider_use.requests_count, provider_use.tokens_used, provider_use.last_used_at) == (
        3,
        116,
        latest,
    )


def test_what_attempts_cost_is_added_up_where_it_is_known(api_key: ApiKey, gateway_key: GatewayKey) -> None:
    ids = {"api_key_id": api_key.pk, "provider_id": api_key.provider_id, "gateway_key_id": gateway_key.pk}
    key_use.count([a_row(**ids, cost_nanodollars=cost) for cost in (1_500_000_000, 1, None)])
    costs = [use.objects.get().cost_nanodollars for use in (KeyUse, ProviderUse, GatewayKeyUse)]
    assert costs == [1_500_000_001] * 3


def test_f40_counters_neither_conflict_with_an_edit_nor_are_overwritten_by_it(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey, owner: User
) -> None:
    client = as_(owner)
    paths = [
        f"{V1}/gateway-keys/{gateway_key.pk}",
        f"{V1}/api-keys/{api_key.pk}",
        f"{V1}/providers/{api_key.provider_id}",
    ]
    before = [client.get(path) for path in paths]
    attempt()
    usage.drain(directory)
    for path, read in zip(paths, before, strict=True):
        body = (
            {**read.json(), "name": "renamed"}
            if "api-keys" not in path
            else {**read.json(), "key_name": "renamed"}
        )
        answer = client.put(path, body, headers={"If-Match": read["ETag"]})
        assert answer.status_code == 200, answer.content
        assert (answer.json()["requests_count"], answer.json()["tokens_used"]) == (1, 14)


def test_the_lists_of_the_admin_show_the_counts(
    api_key: ApiKey, gateway_key: GatewayKey, owner: User
) -> None:
    ids = {"api_key_id": api_key.pk, "provider_id": api_key.provider_id, "gateway_key_id": gateway_key.pk}
    key_use.count([a_row(**ids, prompt_tokens=12_000, cost_nanodollars=2_500_000_000)])
    client = Client()
    client.force_login(owner)
    for name in ("proxy_gatewaykey", "providers_apikey", "providers_provider"):
        page = client.get(reverse(f"admin:{name}_changelist")).content.decode()
        assert "12,009" in page and "$2.50" in page, name


def test_the_mark_of_the_last_use_moves_once_a_minute_at_the_most(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey
) -> None:
    seen = []
    for seconds in (0, 5, 59, 60, 61, 119, 121):
        attempt(start={"created_at": AT + 1000 * seconds})
        usage.drain(directory)
        use = GatewayKeyUse.objects.get(gateway_key=gateway_key)
        assert use.last_used_at == KeyUse.objects.get(api_key=api_key).last_used_at
        assert use.last_used_at is not None
        seen.append(round(use.last_used_at.timestamp() - AT / 1000))
    assert seen == [0, 0, 0, 60, 60, 60, 121]
    assert use.requests_count == 7


def test_a_hundred_calls_with_one_request_id_are_a_hundred_rows_and_requests(db: None, pair: House) -> None:
    """The caller's id correlates; what is counted is known by an id of our own."""
    with changes(actor=None, via="system"):
        key = GatewayKey(name="same")
        whole = give_secret(key)
        key.save()
    pair.admit(build().callers[key.key_id])
    headers = {"x-api-key": whole, "x-request-id": "same"}
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
    with httpx.Client(base_url=pair.url, headers=headers) as client, ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(client.post, "/v1/chat/completions", json=body) for _ in range(100)]
        assert {each.result().headers["x-request-id"] for each in asked} == {"same"}
    pair.stop()
    usage.drain(pair.spool_dir)
    rows = UsageRecord.objects.filter(request_id="same")
    assert (rows.count(), rows.values("id").distinct().count()) == (100, 100)
    assert GatewayKeyUse.objects.get(gateway_key=key).requests_count == 100


def test_a_second_attempt_is_no_second_request_of_the_gateway_key(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey
) -> None:
    attempt(status="error")
    attempt(start={"attempt": 2})
    usage.drain(directory)
    assert KeyUse.objects.get(api_key=api_key).requests_count == 2
    assert GatewayKeyUse.objects.get(gateway_key=gateway_key).requests_count == 1


def test_f32_what_comes_twice_counts_once(attempt: Attempt, directory: Path, api_key: ApiKey) -> None:
    attempt()
    (path,) = directory.glob("*.1")
    shutil.copy(path, path.with_name(f"{uuid.uuid4().hex}.1"))
    usage.drain(directory)
    assert UsageRecord.objects.count() == 1
    assert KeyUse.objects.get(api_key=api_key).requests_count == 1


def test_a_key_that_was_deleted_meanwhile_is_passed_over(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey
) -> None:
    attempt()
    with changes(actor=None, via="system"):
        api_key.delete()
        gateway_key.delete()
    assert usage.drain(directory).records == 1
    assert not KeyUse.objects.exists() and not GatewayKeyUse.objects.exists()


def test_absurd_counts_neither_stop_the_drainer_nor_overflow(
    attempt: Attempt, directory: Path, api_key: ApiKey
) -> None:
    for _ in range(3):
        attempt(prompt_tokens=2**63 - 1, completion_tokens=2**63 - 1)
        assert usage.drain(directory).rejected == 0
    assert KeyUse.objects.get(api_key=api_key).requests_count == 3


def test_what_a_provider_refused_stays_refused(attempt: Attempt, directory: Path, api_key: ApiKey) -> None:
    when = datetime(2026, 1, 1, tzinfo=UTC)
    KeyUse.objects.create(api_key=api_key, rejected_at=when)
    attempt()
    usage.drain(directory)
    use = KeyUse.objects.get(api_key=api_key)
    assert (use.rejected_at, use.requests_count) == (when, 1)


def test_the_api_shows_the_counts(
    attempt: Attempt, directory: Path, api_key: ApiKey, gateway_key: GatewayKey, operator: User
) -> None:
    attempt(prompt_tokens=5, completion_tokens=9)
    usage.drain(directory)
    client = as_(operator)
    row = client.get(f"{V1}/api-keys/{api_key.pk}").json()
    assert (row["requests_count"], row["tokens_used"]) == (1, 14) and row["last_used_at"]
    shown = client.get(f"{V1}/gateway-keys/{gateway_key.pk}").json()
    assert (shown["requests_count"], shown["tokens_used"], shown["cost_usd"]) == (1, 14, 0) and shown[
        "last_used_at"
    ]
    used = client.get(f"{V1}/providers/{api_key.provider_id}").json()
    assert (used["requests_count"], used["tokens_used"], used["cost_usd"]) == (1, 14, 0) and used[
        "last_used_at"
    ]
