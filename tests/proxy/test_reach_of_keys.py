"""What a gateway key opens: which secrets, until when, from where, and which models."""

from __future__ import annotations

import ipaddress
from datetime import timedelta

import pytest
from django.utils import timezone

from audit.changes import changes
from proxy import auth, keys
from proxy.auth import Caller
from proxy.errors import AddressNotAllowed, InvalidApiKey
from proxy.models import GatewayKey
from proxy.selection import allows
from proxy.snapshot import build
from tests.support.inprocess import PEPPERS


@pytest.fixture(autouse=True)
def _peppers(settings: object) -> None:
    settings.PENSTOCK_PEPPERS = PEPPERS  # type: ignore[attr-defined]  # pytest-django's settings take any name


def issued(**fields: object) -> tuple[GatewayKey, str]:
    with changes(actor=None, via="system"):
        key = GatewayKey(name="app", **fields)
        whole = keys.give_secret(key)
        key.save()
    return key, whole


def good(whole: str) -> bool:
    """Whether the configuration as it is now lets this key in."""
    try:
        return bool(auth.authenticate(whole, build().callers, PEPPERS))
    except InvalidApiKey:
        return False


def rotated(key: GatewayKey, overlap: timedelta) -> str:
    with changes(actor=None, via="system"):
        return keys.rotate(key, overlap=overlap)


@pytest.mark.django_db
def test_after_rotating_both_secrets_are_good_until_the_overlap_is_over() -> None:
    key, old = issued()
    new = rotated(key, timedelta(hours=1))
    assert (good(old), good(new)) == (True, True)
    GatewayKey.objects.filter(pk=key.pk).update(previous_until=timezone.now())
    assert (good(old), good(new)) == (False, True)


@pytest.mark.django_db
def test_without_an_overlap_the_old_secret_is_over_at_once() -> None:
    key, old = issued()
    new = rotated(key, timedelta(0))
    assert (good(old), good(new)) == (False, True)


@pytest.mark.django_db
def test_rotating_twice_leaves_the_last_two() -> None:
    key, first = issued()
    second = rotated(key, timedelta(hours=1))
    third = rotated(key, timedelta(hours=1))
    assert (good(first), good(second), good(third)) == (False, True, True)


@pytest.mark.django_db
def test_neither_secret_of_a_rotated_key_outlives_the_key() -> None:
    key, old = issued(expires_at=timezone.now() + timedelta(hours=1))
    new = rotated(key, timedelta(hours=2))
    GatewayKey.objects.filter(pk=key.pk).update(expires_at=timezone.now())
    assert (good(old), good(new)) == (False, False)
    GatewayKey.objects.filter(pk=key.pk).update(expires_at=None)
    with changes(actor=None, via="system"):
        keys.revoke(GatewayKey.objects.get())
    assert (good(old), good(new)) == (False, False)


@pytest.mark.no_database
@pytest.mark.parametrize(
    ("networks", "inside", "outside"),
    [
        (["10.0.0.0/8"], ["10.1.2.3", "::ffff:10.1.2.3"], ["11.0.0.1", "::1", "", "unknown", "::ffff:11.0.0.1"]),
        (["192.0.2.7"], ["192.0.2.7"], ["192.0.2.8"]),
        (["2001:db8::/32"], ["2001:db8::1", "2001:DB8:0::1%eth0"], ["2001:db9::1", "10.0.0.1"]),
        (["10.0.0.0/8", "fd00::/8"], ["10.0.0.1", "fd12::1"], ["fe80::1", "172.16.0.1"]),
        ([], ["10.0.0.1", "2001:db8::1", ""], []),
    ],
)  # fmt: skip
def test_a_key_is_used_from_its_networks_only(
    networks: list[str], inside: list[str], outside: list[str]
) -> None:
    allowed = tuple(ipaddress.ip_network(each) for each in networks)
    caller = Caller(1, "k", "app", "", "", 1, allowed_networks=allowed)
    for address in inside:
        auth.check_address(caller, address)
    for address in outside:
        with pytest.raises(AddressNotAllowed):
            auth.check_address(caller, address)


@pytest.mark.no_database
@pytest.mark.parametrize(
    ("patterns", "allowed", "refused"),
    [
        (["gpt-*"], ["gpt-4o", "gpt-"], ["gpt", "GPT-4o", "openai/gpt-4o", ""]),
        (["openai/*"], ["openai/gpt-4o", "openai/a/b"], ["gpt-4o", "azure/openai/x"]),
        (["*/llama*"], ["box/llama3.2", "a/b/llama"], ["llama3.2", "box/tinyllama"]),
        (["fast", "gpt-4o"], ["fast", "gpt-4o"], ["faster", "fast/gpt-4o"]),
        (["*"], ["anything", "any/thing"], []),
        ([], ["anything"], []),
    ],
)  # fmt: skip
def test_a_star_stands_for_anything(patterns: list[str], allowed: list[str], refused: list[str]) -> None:
    caller = Caller(1, "k", "app", "", "", 1, allowed_models=tuple(patterns))
    assert [name for name in allowed if not allows(caller, name)] == []
    assert [name for name in refused if allows(caller, name)] == []
