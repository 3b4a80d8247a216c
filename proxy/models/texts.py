"""What was said, for gateway keys that keep it."""

from __future__ import annotations

from django.db import models

from audit.changes import Identity
from providers.fields import SealedField
from proxy.models.usage import UsageRecord


class TextRecord(models.Model):
    """The prompt and the answer of a request, sealed for this row, beside the record of the request's last attempt.

    It goes when that record goes. data_key: the id of the key that both are sealed under.
    """

    usage = models.OneToOneField(UsageRecord, on_delete=models.CASCADE, primary_key=True, related_name="text")
    created_at = models.DateTimeField(db_index=True)
    data_key = models.CharField(max_length=32, db_index=True)
    prompt = SealedField()
    answer = SealedField(blank=True)

    class Meta:
        verbose_name = "text record"

    def __str__(self) -> str:
        return f"the text of {self.pk}"

    def audit_identity(self) -> Identity:
        return Identity("text_record", str(self.pk), str(self), "text")
