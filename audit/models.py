"""The log of changes: an append-only chain of entries and its one-row head."""

from __future__ import annotations

from typing import ClassVar

from django.db import models


class Head(models.Model):
    """The end of the chain. `seq` is also the version of the configuration: it grows with every change.

    One row. Whoever changes configuration locks it first, so writers queue and the chain has no forks.
    """

    id = models.PositiveSmallIntegerField(primary_key=True, default=1)
    seq = models.BigIntegerField(default=0)
    hash = models.CharField(max_length=64, default="0" * 64)

    class Meta:
        constraints: ClassVar = [
            models.CheckConstraint(condition=models.Q(id=1), name="audit_head_is_one_row")
        ]

    def __str__(self) -> str:
        return f"{self.seq} {self.hash[:12]}"


class Entry(models.Model):
    """One change of one thing. Holds ids and names, no foreign keys: deleting a thing never rewrites its history.

    changes: {"field": [before, after]}; secrets appear only as fingerprints. Triggers refuse UPDATE and DELETE.
    hash: SHA-256 over the previous entry's hash and this entry's canonical JSON (see audit.chain).
    """

    class Via(models.TextChoices):
        ADMIN = "admin", "Admin"
        API = "api", "API"
        TASK = "task", "Task"
        COMMAND = "command", "Command"
        SYSTEM = "system", "System"
        RESTORE = "restore", "Restore"

    seq = models.BigIntegerField(primary_key=True)
    timestamp = models.DateTimeField(db_index=True)
    action = models.CharField(max_length=64, db_index=True)
    entity_type = models.CharField(max_length=64)
    entity_id = models.CharField(max_length=64)
    entity_name = models.CharField(max_length=255, blank=True)
    user_id = models.BigIntegerField(null=True, blank=True, db_index=True)
    username = models.CharField(max_length=150, blank=True)
    via = models.CharField(max_length=16, choices=Via)
    ip = models.GenericIPAddressField(null=True, blank=True)
    request_id = models.CharField(max_length=128, blank=True)
    changes = models.JSONField(default=dict)
    hash = models.CharField(max_length=64)

    class Meta:
        ordering: ClassVar = ["-seq"]
        verbose_name = "audit entry"
        verbose_name_plural = "audit log"
        indexes: ClassVar = [
            models.Index(fields=["entity_type", "entity_id", "-seq"], name="audit_entry_entity")
        ]

    def __str__(self) -> str:
        return f"{self.seq} {self.action} {self.entity_name}"
