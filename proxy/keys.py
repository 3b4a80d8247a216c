"""Gateway keys: their form, and issuing, rotating and revoking them.

A token for browsers stands for a key for a few minutes: `pen_tmp_<id of the key: 10><expiry: epoch seconds, 8 hex><mac: 64 hex>_<crc>`.
Nothing of it is stored.

Form: `pen_live_<id: 10 base62><secret: 32 base62>_<crc: 6 base62>`, where crc is the CRC-32 of the ASCII text before the
last underscore in base62 (0-9A-Za-z), padded with zeros. Published for secret scanners as `FORM`.
"""

from __future__ import annotations

import functools
import hmac
import re
import secrets
import string
import zlib
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, NamedTuple

from django.conf import settings
from django.utils import timezone

if TYPE_CHECKING:
    # The form of keys is also known to the settings, which are read before there are models.
    from proxy.models import GatewayKey

ALPHABET = string.digits + string.ascii_uppercase + string.ascii_lowercase
FORM = re.compile(r"pen_live_(?P<id>[0-9A-Za-z]{10})(?P<secret>[0-9A-Za-z]{32})_(?P<crc>[0-9A-Za-z]{6})")
DEFAULT_OVERLAP = timedelta(hours=24)
BROWSER_FORM = re.compile(
    r"(?P<body>pen_tmp_(?P<id>[0-9A-Za-z]{10})(?P<until>[0-9a-f]{8}))(?P<mac>[0-9a-f]{64})_(?P<crc>[0-9A-Za-z]{6})"
)
BROWSER_SECONDS = 900
"""The longest life of a token for browsers."""


class Parts(NamedTuple):
    key_id: str
    secret: str


def checksum(text: str) -> str:
    number, digits = zlib.crc32(text.encode("ascii")), ""
    while number:
        number, digit = divmod(number, 62)
        digits = ALPHABET[digit] + digits
    return digits.rjust(6, "0")


def compose(key_id: str, secret: str) -> str:
    text = f"pen_live_{key_id}{secret}"
    return f"{text}_{checksum(text)}"


def parse(text: str) -> Parts | None:
    """The parts of a well-formed key with a right checksum; None for anything else, without any look-up (R11)."""
    match = FORM.fullmatch(text)
    if match is None or checksum(text[:-7]) != match["crc"]:
        return None
    return Parts(match["id"], match["secret"])


class BrowserParts(NamedTuple):
    """until: epoch seconds. body is what the MAC, in hex, is over."""

    key_id: str
    until: int
    body: str
    mac: str


def parse_browser_token(text: str) -> BrowserParts | None:
    """The parts of a well-formed browser token with a right checksum; None for anything else."""
    match = BROWSER_FORM.fullmatch(text)
    if match is None or checksum(text[:-7]) != match["crc"]:
        return None
    return BrowserParts(match["id"], int(match["until"], 16), match["body"], match["mac"])


def browser_mac(body: str, stored_digest: str, pepper: bytes) -> str:
    """Hex HMAC-SHA256 of a token's body under a key made of the pepper and of what is stored of its gateway key.

    So a token ends with the secret that it was made for, and nobody who has only the database can make one.
    """
    key = hmac.digest(pepper, f"browser token {stored_digest}".encode("ascii"), "sha256")
    return hmac.digest(key, body.encode("ascii"), "sha256").hex()


def browser_token(key: GatewayKey, *, seconds: int = BROWSER_SECONDS) -> tuple[str, datetime]:
    """A token that stands for `key` for so long, or until the key expires, and when that is. Nothing is stored."""
    from providers.fields import raw

    until = timezone.now().replace(microsecond=0) + timedelta(seconds=min(seconds, BROWSER_SECONDS))
    if key.expires_at is not None:
        until = min(until, key.expires_at)
    body = f"pen_tmp_{key.key_id}{int(until.timestamp()):08x}"
    text = body + browser_mac(body, raw(key.hmac), settings.PENSTOCK_PEPPERS[key.pepper])
    return f"{text}_{checksum(text)}", until


def digest(secret: str, pepper: bytes) -> str:
    """Hex HMAC-SHA256 of the secret under a pepper: what is stored and compared."""
    mac = _begun(pepper).copy()
    mac.update(secret.encode("ascii"))
    return mac.hexdigest()


@functools.lru_cache(maxsize=16)
def _begun(pepper: bytes) -> hmac.HMAC:
    """Each request has the same beginning, and looking an algorithm up by its name costs more than the hash."""
    return hmac.new(pepper, digestmod="sha256")


def random_text(length: int) -> str:
    return "".join(secrets.choice(ALPHABET) for _ in range(length))


def give_secret(key: GatewayKey, secret: str | None = None) -> str:
    """Put a new secret (or the given one) into `key` and answer the whole key, which is never known again. Does not save."""
    secret = secret or random_text(32)
    key.key_id = key.key_id or random_text(10)
    key.pepper = max(settings.PENSTOCK_PEPPERS)
    key.hmac = digest(secret, settings.PENSTOCK_PEPPERS[key.pepper])
    key.last4 = compose(key.key_id, secret)[-4:]
    return compose(key.key_id, secret)


def default_concurrency() -> int | None:
    """Requests at the same time that a new key may run when whoever makes it says nothing about that; None is no limit."""
    return settings.DEFAULT_MAX_CONCURRENCY or None


def adopt(key: GatewayKey, whole: str) -> None:
    """Make `key` the key `whole`, chosen by the administrator. ValueError when it is not well-formed. Does not save."""
    parts = parse(whole)
    if parts is None:
        raise ValueError("not a well-formed gateway key")
    key.key_id = parts.key_id
    give_secret(key, parts.secret)


def rotate(key: GatewayKey, *, overlap: timedelta = DEFAULT_OVERLAP) -> str:
    """A new secret; the old one stays good for `overlap`. Saves; inside `audit.changes`."""
    key.previous_hmac, key.previous_pepper = key.hmac, key.pepper
    key.previous_until = timezone.now() + overlap
    whole = give_secret(key)
    key.save()
    return whole


def empty_cache(key: GatewayKey) -> None:
    """Have no answer that was kept until now given again, to this key or another one of its owner. Saves; inside `audit.changes`."""
    key.cache_emptied_at = timezone.now()
    key.save()
    for other in key.sharing_a_cache().exclude(pk=key.pk):
        other.cache_emptied_at = key.cache_emptied_at
        other.save()


def revoke(key: GatewayKey) -> None:
    """End the key for ever, on every worker and every open stream. Saves; inside `audit.changes`."""
    key.revoked_at = timezone.now()
    key.enabled = False
    key.save()
