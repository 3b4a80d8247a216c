"""The documents say what the code reads: an undocumented setting, or a documented one that is gone, fails."""

from __future__ import annotations

import re
from pathlib import Path

from django.conf import settings

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "settings.md").read_text()


def documented() -> set[str]:
    """The names in the first column of the tables of settings that are read."""
    read = PAGE.partition("## Named, but not read yet")[0]
    return set(re.findall(r"^\| `([A-Z_]+)` \|", read, re.MULTILINE))


def test_every_setting_is_documented() -> None:
    assert set(settings.SETTINGS_NAMES) - documented() == set()


def test_no_setting_is_documented_that_nobody_reads() -> None:
    assert documented() - set(settings.SETTINGS_NAMES) == set()


def test_every_link_between_pages_leads_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
