"""Sealing: what opens, what does not, and what a secret looks like when somebody prints it."""

from __future__ import annotations

import base64
import copy
import json
import pickle
import secrets

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given
from hypothesis import strategies as st

from providers import crypto
from providers.crypto import Keyring, Secret
from providers.errors import CredentialUnavailable

pytestmark = pytest.mark.no_database

AAD = crypto.aad_for("providers.apikey", "secret", "uid", "https://api.example.com:443")
ROUNDS = 1000


@given(st.text(max_size=300))
def test_what_was_sealed_opens(text: str) -> None:
    ring = Keyring.fresh()
    assert ring.open(ring.seal(text, aad=AAD), aad=AAD).reveal() == text


def test_the_same_value_is_never_sealed_the_same_way() -> None:
    ring = Keyring.fresh()
    assert len({ring.seal("value", aad=AAD) for _ in range(100)}) == 100


@pytest.mark.parametrize(
    "other",
    [
        crypto.aad_for("providers.other", "secret", "uid", "https://api.example.com:443"),
        crypto.aad_for("providers.apikey", "other", "uid", "https://api.example.com:443"),
        crypto.aad_for("providers.apikey", "secret", "another", "https://api.example.com:443"),
        crypto.aad_for("providers.apikey", "secret", "uid", "https://evil.example.com:443"),
        b"",
    ],
)
def test_r02_a_value_opens_for_nothing_else(other: bytes) -> None:
    ring = Keyring.fresh()
    with pytest.raises(CredentialUnavailable):
        ring.open(ring.seal("value", aad=AAD), aad=other)


def test_r03_a_change_of_any_byte_is_noticed() -> None:
    ring = Keyring.fresh()
    sealed = ring.seal("value", aad=AAD)
    head, _, blob = sealed.rpartition(".")
    data = base64.urlsafe_b64decode(blob)
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises(CredentialUnavailable):
            ring.open(f"{head}.{base64.urlsafe_b64encode(changed).decode()}", aad=AAD)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "v1",
        "v1.",
        "v1..",
        "plain",
        "v2.{kid}.AAAA",
        "v1.{kid}.",
        "v1.{kid}.!",
        "v1.{kid}.AAAA",
        "v1.{kid}.é",
    ],
)
def test_r03_what_is_no_sealed_value_is_refused_and_nothing_else_is_raised(text: str) -> None:
    ring = Keyring.fresh()
    with pytest.raises(CredentialUnavailable) as raised:
        ring.open(text.replace("{kid}", ring.primary), aad=AAD)
    assert "value" in str(raised.value.detail) or "key" in str(raised.value.detail)


def test_a_value_cut_anywhere_does_not_open() -> None:
    ring = Keyring.fresh()
    sealed = ring.seal("value", aad=AAD)
    for length in range(len(sealed)):
        with pytest.raises(CredentialUnavailable):
            ring.open(sealed[:length], aad=AAD)


def test_it_says_which_key_a_value_is_under() -> None:
    ring = Keyring.fresh()
    assert crypto.key_id(ring.seal("value", aad=AAD)) == ring.primary
    assert crypto.key_id("value") == ""


def test_older_values_open_after_a_key_was_added_and_not_after_theirs_was_dropped() -> None:
    old = Keyring.fresh()
    sealed = old.seal("value", aad=AAD)
    new = old.with_new_key()
    assert new.primary != old.primary
    assert new.open(sealed, aad=AAD).reveal() == "value"
    with pytest.raises(CredentialUnavailable):
        new.without(old.primary).open(sealed, aad=AAD)


def test_fingerprints_stay_comparable_through_rotation() -> None:
    first = Keyring.fresh()
    before = first.fingerprint("value")
    rotated = first.with_new_key().without(first.primary)
    key = secrets.token_bytes(32)
    stored = crypto.unwrap(crypto.wrap(rotated, key, rounds=ROUNDS), key)
    assert stored is not None
    assert rotated.fingerprint("value") == stored.fingerprint("value") == before
    assert before != first.fingerprint("another")
    assert before != Keyring.fresh().fingerprint("value")


def test_a_keyring_opens_with_its_key_alone() -> None:
    ring, key = Keyring.fresh(), secrets.token_bytes(32)
    wrap = crypto.wrap(ring, key, rounds=ROUNDS)
    assert crypto.unwrap(wrap, key) == ring
    assert crypto.unwrap(wrap, secrets.token_bytes(32)) is None
    assert crypto.unwrap(crypto.Wrap(wrap.salt, wrap.rounds, wrap.blob[:-8] + "AAAAAAA="), key) is None
    assert crypto.unwrap(crypto.Wrap("", wrap.rounds, ""), key) is None


def test_a_keyring_is_stretched_as_slowly_as_promised() -> None:
    assert crypto.wrap(Keyring.fresh(), b"k" * 32).rounds >= 600_000


def test_a_keyring_without_a_marker_keeps_the_fingerprints_it_had() -> None:
    key, salt, nonce, data_key = (
        secrets.token_bytes(32),
        secrets.token_bytes(16),
        secrets.token_bytes(12),
        bytes(32),
    )
    text = json.dumps({"primary": "a", "keys": {"a": base64.urlsafe_b64encode(data_key).decode()}}).encode()
    blob = AESGCM(crypto._stretch(key, salt, ROUNDS)).encrypt(nonce, text, crypto.WRAP_AAD)
    wrap = crypto.Wrap(
        base64.urlsafe_b64encode(salt).decode(), ROUNDS, base64.urlsafe_b64encode(nonce + blob).decode()
    )
    ring = crypto.unwrap(wrap, key)
    assert ring is not None
    rotated = ring.with_new_key().without("a")
    assert (
        rotated.fingerprint("value")
        == ring.fingerprint("value")
        == Keyring("a", {"a": data_key}, data_key).fingerprint("value")
    )


def test_a_secret_prints_as_dots_everywhere() -> None:
    secret = Secret("hunter2-hunter2")
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>40}",
        f"{secret!r}",
        repr([secret]),
        repr({"a": secret}),
    ]
    assert not any("hunter2" in text for text in shown)
    assert secret.reveal() == "hunter2-hunter2"


def test_a_secret_is_neither_pickled_nor_hashed_nor_compared_to_text() -> None:
    secret = Secret("value")
    for act in (pickle.dumps, copy.copy, copy.deepcopy, hash):
        with pytest.raises(TypeError):
            act(secret)
    assert secret == Secret("value")
    assert secret != Secret("other")
    assert secret != "value"


def test_a_keyring_does_not_print_its_keys() -> None:
    ring = Keyring.fresh()
    assert "bytes" not in repr(ring)
    assert not any(repr(key) in repr(ring) for key in ring.keys.values())
