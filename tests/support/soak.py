"""How long the long runs of `make soak` last, and what they say of themselves."""

from __future__ import annotations

import os
from collections.abc import Sequence

SECONDS = float(os.environ.get("SOAK_SECONDS", "300"))
"""Of load in each of them. Shorter is for trying them out: the figures that count are those of five minutes."""


def percentile(took: Sequence[float], share: float) -> float:
    """In the unit of what was measured: 0.99 gives what all but one in a hundred stay below."""
    return sorted(took)[min(len(took) - 1, int(len(took) * share))]


def say(**figures: object) -> None:
    """Printed where pytest shows what passed tests have printed, which `make soak` asks for."""
    print("measured:", ", ".join(f"{name} {value}" for name, value in figures.items()))
