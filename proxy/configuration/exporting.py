"""A whole backup that leaves the machine: nobody gets one without a line in the audit log (R50)."""

from __future__ import annotations

from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser

from audit.changes import Identity, Via, changes, current
from proxy.configuration import document


def taken_out(
    *,
    actor: AbstractBaseUser | AnonymousUser | None,
    via: Via,
    ip: str | None = None,
    request_id: str = "",
) -> document.Document:
    """The backup of this moment, recorded before anybody has it. Raises AuditUnavailable; then there is none."""
    made = document.build(sealed=True)
    with changes(actor=actor, via=via, ip=ip, request_id=request_id):
        identity = Identity("backup", made["made"]["at"], "configuration", "backup")
        current().add(
            verb="export", identity=identity, changes={"version": [None, made["made"]["head"]["seq"]]}
        )
    return made
