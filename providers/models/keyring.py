from __future__ import annotations

from typing import ClassVar

from django.db import models

from audit.changes import Identity
from providers.fields import HiddenJSONField, SealedField


class Keyring(models.Model):
    """The wrapped data keys. One row, made by migrate.

    wraps: the same keyring under each accepted encryption key ({"salt", "rounds", "blob"}); two only while the key from
    the environment is being changed. canary: a known text sealed under the primary key, opened at every start.
    """

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    wraps = HiddenJSONField()
    canary = SealedField()
    primary_kid = models.CharField(max_length=32)
    updated_at = models.DateTimeField(auto_now=True)

    class Meta:
        constraints: ClassVar = [models.CheckConstraint(condition=models.Q(id=1), name="keyring_is_one_row")]

    def __str__(self) -> str:
        return f"keyring, sealing under {self.primary_kid}"

    def audit_identity(self) -> Identity:
        return Identity("keyring", str(self.pk), str(self), "keyring")
