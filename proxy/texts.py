"""What was asked and answered, for gateway keys that say so (`record_text`): sealed by the worker, kept beside the usage record.

Nothing of it leaves the worker unsealed: the spool and the database have sealed text only, and nothing else has any.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator, Mapping
from datetime import timedelta
from typing import Any, NamedTuple

from django.conf import settings
from django.utils import timezone

from providers import sealing
from providers.adapters.json_values import mapping
from providers.errors import CredentialUnavailable
from providers.fields import raw
from proxy.copies import Clip, listed
from proxy.models import TextRecord, UsageRecord
from proxy.segments import SealedTexts
from proxy.spool import Spool

MAX_TEXT_BYTES = 16 * 1024
"""Of a prompt, and of an answer; the rest is cut off."""
MODEL = "proxy.textrecord"
FIELDS = ("prompt", "answer")
BATCH = 200
MAX_SEALED = 32 * 1024
"""Characters of a sealed text; whatever is longer was not written by a worker."""


class Said(NamedTuple):
    prompt: str
    answer: str


def keep(spool: Spool, attempt_id: str, body: Mapping[str, Any], answer: str) -> None:
    """Seal what was asked and answered, and give it to the spool. Does not wait; without a keyring nothing is kept."""
    try:
        spool.keep({"id": attempt_id, **sealed(attempt_id, Said(prompt_of(body), answer))})
    except CredentialUnavailable:
        return


def sealed(uid: str, said: Said) -> SealedTexts:
    """Both texts, sealed for the row of this id. Raises KeyringUnavailable."""
    prompt, answer = (
        sealing.seal(text, model=MODEL, field=name, uid=uid) for name, text in zip(FIELDS, said, strict=True)
    )
    return {"prompt": prompt, "answer": answer}


def prompt_of(body: Mapping[str, Any]) -> str:
    """The messages of a chat request in words, each after its role, as far as MAX_TEXT_BYTES go."""
    clip = Clip(MAX_TEXT_BYTES)
    for message in map(mapping, listed(body.get("messages"))):
        for words in _words(message):
            clip.add(words)
        if not clip.left:
            break
    return str(clip)


def _words(message: Mapping[str, Any]) -> Iterator[str]:
    yield f"{message.get('role')}: "
    content = message.get("content")
    if isinstance(content, str):
        yield content
    for part in map(mapping, listed(content)):
        text = part.get("text")
        yield text if isinstance(text, str) else f"[{part.get('type')}]"
    for call in map(mapping, listed(message.get("tool_calls"))):
        function = mapping(call.get("function"))
        yield f"{function.get('name')}({function.get('arguments')})"
    yield "\n"


def insert(kept: Collection[Mapping[str, Any]]) -> None:
    """Insert texts out of the spool whose usage records are there; inside the drainer's transaction. What is there already stays."""
    rows = {row.pk: row for row in map(_row, kept) if row is not None}
    if not rows:
        return
    known = UsageRecord.objects.filter(pk__in=rows).values_list("pk", flat=True)
    TextRecord.objects.bulk_create([rows[pk] for pk in known], ignore_conflicts=True, batch_size=BATCH)


def _row(record: Mapping[str, Any]) -> TextRecord | None:
    try:
        key = uuid.UUID(record["id"])
    except (KeyError, ValueError, TypeError, AttributeError):
        return None
    sealed = {name: record.get(name) for name in FIELDS}
    if not all(map(_is_sealed, sealed.values())):
        return None
    under = sealing.sealed_under(str(sealed["prompt"]))
    return TextRecord(usage_id=key, created_at=timezone.now(), data_key=under[:32], **sealed)


def _is_sealed(text: object) -> bool:
    """Whether it looks like what a worker seals; what does not might be in clear, or no database would take it."""
    if not isinstance(text, str) or len(text) > MAX_SEALED:
        return False
    return text.isascii() and text.isprintable() and bool(sealing.sealed_under(text))


def read(row: TextRecord) -> Said:
    """Raises CredentialUndecryptable when it was changed, or its key is gone."""
    stored = ((name, raw(getattr(row, name))) for name in FIELDS)
    return Said(*(sealing.unseal(text, model=MODEL, field=name, uid=row.pk.hex) for name, text in stored))


def purge(*, most: int) -> int:
    """Forget up to `most` texts older than TEXT_RETENTION_DAYS; how many they were."""
    before = timezone.now() - timedelta(days=settings.TEXT_RETENTION_DAYS)
    old = TextRecord.objects.filter(created_at__lt=before).order_by("created_at").values_list("pk", flat=True)
    return TextRecord.objects.filter(pk__in=list(old[:most])).delete()[0]
