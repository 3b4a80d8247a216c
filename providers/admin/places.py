"""Where a provider or key is in use, as links, for those who want to delete it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from django.db.models import Q
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString

from providers.models import ActiveTarget, ApiKey, Provider

Finder = Callable[[list[int]], list[SafeString]]
_finders: list[Finder] = []


def know(finder: Finder) -> None:
    """Tell how to find where an application above this one uses providers, by their ids."""
    _finders.append(finder)


def uses_of_providers(providers: Iterable[Provider]) -> list[SafeString]:
    ids = [provider.pk for provider in providers]
    return [*_uses(Q(provider__in=ids)), *(use for finder in _finders for use in finder(ids))]


def uses_of_keys(keys: Iterable[ApiKey]) -> list[SafeString]:
    return _uses(Q(api_key__in=[key.pk for key in keys]))


def _uses(condition: Q) -> list[SafeString]:
    targets = ActiveTarget.objects.filter(condition).select_related("active", "provider")
    return [_use(target) for target in targets]


def _use(target: Any) -> SafeString:
    place = "active provider" if target.position == 0 else f"fallback {target.position}"
    return format_html(
        '{} is the {} for {}: <a class="ps-link" href="{}">choose another one there first</a>.',
        target.provider.name,
        place,
        str(target.active).lower(),
        reverse("admin:providers_activeprovider_change", args=[target.active.purpose]),
    )
