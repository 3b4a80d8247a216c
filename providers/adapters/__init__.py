"""Every kind of provider there is, by name. Adding one is a line in `vendors.py`, or a small file like `ollama.py`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from providers import errors
from providers.adapters import compatible, echo, llamacpp, ollama, vllm
from providers.adapters.vendors import VENDOR_KINDS
from providers.wire import Kind

_ALL = (*VENDOR_KINDS, vllm.KIND, ollama.KIND, llamacpp.KIND, compatible.KIND, echo.KIND)

KINDS: Mapping[str, Kind] = MappingProxyType({kind.name: kind for kind in _ALL})
SELF_HOSTED: frozenset[str] = frozenset(kind.name for kind in _ALL if kind.self_hosted)
VENDORS: frozenset[str] = frozenset(kind.name for kind in VENDOR_KINDS)


def kind(name: str) -> Kind:
    """Raises errors.UnknownKind, for a row that somebody wrote past the forms."""
    try:
        return KINDS[name]
    except KeyError:
        raise errors.UnknownKind(detail=f"kind {name[:64]!r}") from None
