"""Second factors: one-time codes of an app, passkeys, recovery codes. allauth keeps them; here is what it leaves to others.

The seeds of codes are sealed under a key of the newest pepper, so a dump of the database is worth nothing without it. A code
counts once: whoever looks over a shoulder comes too late.
"""

from __future__ import annotations

import base64
import hmac
import logging
import secrets
from typing import Any

from allauth.core import context
from allauth.core.internal.cryptokit import normalize_user_code
from allauth.mfa.adapter import DefaultMFAAdapter
from allauth.mfa.base.forms import AuthenticateForm, ReauthenticateForm
from allauth.mfa.models import Authenticator
from allauth.mfa.totp.internal.auth import format_hotp_value, hotp_value, yield_hotp_counters_from_time
from allauth.mfa.utils import decrypt
from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from django.conf import settings
from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models.signals import post_save, pre_delete

from audit.access import signing_in
from audit.access.records import note

logger = logging.getLogger(__name__)

FACTORS = (Authenticator.Type.TOTP, Authenticator.Type.WEBAUTHN)
"""Either makes a login ask for more. Recovery codes stand in for them and are nothing by themselves."""
CHANGED = "change_second_factor"
LAST = "last_counter"
"""In the data of an app's seed: the newest time step whose code was used (RFC 6238, 5.2)."""


def box() -> MultiFernet:
    """Seals under the newest pepper, opens what any of them sealed."""
    peppers = settings.PENSTOCK_PEPPERS
    keys = (
        hmac.digest(peppers[number], b"penstock second factor", "sha256") for number in sorted(peppers)[::-1]
    )
    return MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])


class Sealed(DefaultMFAAdapter):  # type: ignore[misc]  # allauth carries no types
    def encrypt(self, text: str) -> str:
        return box().encrypt(text.encode()).decode()

    def decrypt(self, encrypted_text: str) -> str:
        """Raises InvalidToken when the pepper it was sealed under is gone."""
        return box().decrypt(encrypted_text.encode()).decode()

    def get_public_key_credential_rp_entity(self) -> dict[str, str]:
        return {**super().get_public_key_credential_rp_entity(), "name": "Penstock"}

    def generate_authenticator_name(self, user: Any, type: Any) -> str:  # noqa: A002 -- allauth's name
        count = Authenticator.objects.filter(user_id=user.pk, type=type).count()
        return f"Passkey {count + 1}"


def is_enrolled(user: Any) -> bool:
    return bool(Authenticator.objects.filter(user_id=user.pk, type__in=FACTORS).exists())


def accept_code(request: Any, user: Any, code: str) -> Authenticator | None:
    """The authenticator whose code this is, which is spent by that; None for a wrong one. Raises signing_in.Locked."""
    signing_in.refuse_locked(request, user.get_username())
    code = "".join(code.split())
    rows = Authenticator.objects.filter(user_id=user.pk).exclude(type=Authenticator.Type.WEBAUTHN)
    for row in rows:
        try:
            if _is_code_of(row, code):
                return row
        except InvalidToken:
            logger.error("a second factor of user %s does not open: its pepper is gone", user.pk)
    signing_in.count_failure(request, user, what="second factor")
    return None


def spend_first_code(user: Any, code: str) -> None:
    """The code that enrolled the app of `user` is used by that; whoever saw it typed opens nothing with it."""
    row = Authenticator.objects.get(user_id=user.pk, type=Authenticator.Type.TOTP)
    _is_code_of(row, normalize_user_code(code))


def _is_code_of(row: Authenticator, code: str) -> bool:
    if row.type == Authenticator.Type.RECOVERY_CODES:
        return bool(row.wrap().validate_code(code))
    with transaction.atomic():
        row = Authenticator.objects.select_for_update().get(pk=row.pk)
        seed = decrypt(row.data["secret"])
        for counter in yield_hotp_counters_from_time():
            expected = format_hotp_value(hotp_value(seed, counter))
            same = secrets.compare_digest(expected.encode(), code.encode("utf-8", "replace"))
            if same and counter > row.data.get(LAST, 0):
                row.data[LAST] = counter
                row.save(update_fields=["data"])
                return True
    return False


def reset(user: Any) -> int:
    """Remove all second factors of somebody who has lost them; how many there were. Inside `audit.changes`."""
    count, _ = Authenticator.objects.filter(user_id=user.pk).delete()
    return int(count)


class _Checked:
    """A form with a code, checked by us."""

    user: Any
    cleaned_data: dict[str, Any]
    authenticator: Authenticator

    def clean_code(self) -> str:
        code = str(self.cleaned_data["code"])
        try:
            found = accept_code(context.request, self.user, code)
        except signing_in.Locked:
            raise ValidationError("Too many wrong codes; try again later.") from None
        if found is None:
            raise ValidationError("This code is wrong, or was used before.")
        found.user = self.user
        self.authenticator = found
        return code


class CodeForm(_Checked, AuthenticateForm):  # type: ignore[misc]  # allauth carries no types
    """The second step of a login."""


class CodeAgainForm(_Checked, ReauthenticateForm):  # type: ignore[misc]  # allauth carries no types
    """Before one's own second factors are changed."""


def connect() -> None:
    """Have every factor that comes or goes noted; it does neither outside the door for changes."""
    post_save.connect(_added, sender=Authenticator, dispatch_uid="audit-second-factor-added")
    pre_delete.connect(_removed, sender=Authenticator, dispatch_uid="audit-second-factor-removed")


def _added(instance: Authenticator, created: bool, **kwargs: Any) -> None:
    if created:
        note(instance.user, CHANGED, {str(instance.type): [None, instance.pk]})


def _removed(instance: Authenticator, **kwargs: Any) -> None:
    note(instance.user, CHANGED, {str(instance.type): [instance.pk, None]})
