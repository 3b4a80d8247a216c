"""Writing the keys of providers: sealing, masking, and what happens to them when a provider moves."""

from __future__ import annotations

import re

from django.core.exceptions import ValidationError
from django.utils import timezone

from audit.changes import changes, record
from providers import crypto, keyring
from providers.crypto import Secret
from providers.models import ApiKey, KeyUse, Provider
from providers.wire import origin_of

ACCEPTED = re.compile(r"[\x21-\x7e]{1,4096}")
MASKED = re.compile(r"^(?:\*{2,}|•{2,}|…|\.{3}).{0,8}$")
REFERENCE = re.compile(r"^(env|file)://.+$")
LATER = re.compile(r"^(vault|op)://.+$")
DEFAULT_NAME = "default"


def check_value(value: str) -> None:
    """A key is printable ASCII without spaces; masked text, as forms and APIs show it, is never taken for a key."""
    if LATER.match(value):
        raise ValidationError("This kind of reference is not available yet; use env://NAME or file:///path.")
    if MASKED.match(value):
        raise ValidationError("This is the masked form of a key. Leave it out to keep the stored key.")
    if not ACCEPTED.fullmatch(value):
        raise ValidationError("A key is 1 to 4096 printable characters without spaces.")


def store(key: ApiKey, value: str) -> None:
    """Put a new secret, or a reference to one, into `key`, sealed for its provider's origin. Does not save.

    What was known of the former one ends with it. Raises ValidationError when the value cannot be a key.
    """
    check_value(value)
    ring = keyring.current()
    key.secret = ring.seal(value, aad=_aad(key, key.provider))
    key.fingerprint = ring.fingerprint(value)
    key.reference = value if REFERENCE.match(value) else ""
    # Four characters of a short key would be most of it.
    key.last4 = value[-4:] if not key.reference and len(value) >= 12 else ""
    if key.pk:
        KeyUse.objects.filter(api_key=key.pk).update(undecryptable_at=None)


def opened(key: ApiKey) -> Secret:
    """The sealed content of `key`: a secret or a reference. Raises CredentialUnavailable."""
    credential = key.credential()
    return keyring.current().open(credential.stored, aad=_aad(key, key.provider))


def note_undecryptable(key_id: int) -> bool:
    """Record that what is stored for this key does not open: once for each broken secret, whoever asks; whether it was now.

    The row itself is looked at, because a request may have held a value that was replaced since. Raises AuditUnavailable,
    DatabaseError or WrongEncryptionKey; then nothing was recorded.
    """
    key = ApiKey.objects.select_related("provider", "use").filter(pk=key_id).first()
    if key is None or (hasattr(key, "use") and key.use.undecryptable_at is not None):
        return False
    # Read after the row, so that it holds the data key of whatever a rotation has put there.
    keyring.load_if_changed()
    if not keyring.problem(key):
        return False
    with changes(actor=None, via="system"):
        KeyUse.objects.get_or_create(api_key=key)
        now = timezone.now()
        same = KeyUse.objects.filter(api_key=key, api_key__secret=key.secret, undecryptable_at=None)
        won = bool(same.update(undecryptable_at=now))
        if won:
            record(
                key,
                verb="undecryptable",
                before={"undecryptable_at": None},
                after={"undecryptable_at": now.isoformat()},
            )
    return won


def write_default(
    provider: Provider, value: str, *, created_by: str = "", enable: bool = True, revive: bool = True
) -> ApiKey:
    """Store `value` as the provider's default key, made now if it has none, which is as `add` does it.

    revive: enable the key that is there. False where whoever enters a secret may not do that.
    """
    key = provider.keys.filter(is_default=True).first()
    if key is None:
        key = ApiKey(provider=provider, name=_free_name(provider), is_default=True, created_by=created_by)
        add(key, value, enable=enable)
        return key
    key.provider = provider
    key.enabled = key.enabled or revive
    store(key, value)
    key.full_clean(validate_constraints=False)
    key.save()
    return key


def add(key: ApiKey, value: str, *, enable: bool = True) -> None:
    """Save a new key with its secret. The first key of a provider becomes its default and enables a vendor.

    enable: False where somebody says in the same breath that the vendor is to stay as it is.
    """
    provider = key.provider
    first = not provider.keys.exists()
    key.is_default = key.is_default or first
    if key.is_default:
        clear_default(provider, but=key)
    store(key, value)
    key.full_clean(validate_constraints=False)
    key.save()
    if enable and first and not provider.enabled and not provider.self_hosted:
        provider.enabled = True
        provider.save()


def clear_default(provider: Provider, *, but: ApiKey) -> None:
    """Take the default mark from the provider's other keys."""
    for other in provider.keys.filter(is_default=True).exclude(pk=but.pk):
        other.is_default = False
        other.save()


def moves(provider: Provider, base_url: str) -> bool:
    """Whether `base_url` would send the provider's stored keys to another scheme, host or port."""
    return origin_of(base_url) != provider.origin and provider.keys.exists()


def disable_left_behind(provider: Provider, *, but: ApiKey) -> None:
    """After a move, keys that did not come along are for another address: they stay, disabled, until entered again."""
    for other in provider.keys.filter(enabled=True).exclude(pk=but.pk):
        other.enabled = False
        other.save()


def _free_name(provider: Provider) -> str:
    taken = set(provider.keys.values_list("name", flat=True))
    return next(
        name for name in (DEFAULT_NAME, *(f"{DEFAULT_NAME} {n}" for n in range(2, 1000))) if name not in taken
    )


def _aad(key: ApiKey, provider: Provider) -> bytes:
    return crypto.aad_for("providers.apikey", "secret", str(key.uid), provider.origin)
