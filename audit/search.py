"""Finding entries by what they changed."""

from __future__ import annotations

from django.db.models import Q


def about_fingerprint(fingerprint: str) -> Q:
    """The entries in which this keyed hash of a secret came or went."""
    return Q(changes__fingerprint__0=fingerprint) | Q(changes__fingerprint__1=fingerprint)
