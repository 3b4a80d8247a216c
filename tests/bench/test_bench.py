"""What the bench can be asked, and whom it compares with, is on its page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.bench.peers import PEERS, Peer
from tests.bench.rounds import Mode, modes

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_every_peer_is_documented_with_how_to_install_and_find_it(peer: Peer) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith("|") and peer.variable in line)
    first, *_ = peer.install.split(", then")
    assert all(part.split()[-1].strip("'") in row for part in first.split(" && "))


def test_a_peer_is_found_where_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_NGINX", "/elsewhere/nginx")
    assert PEERS[0].found() == "/elsewhere/nginx"


def test_every_option_is_documented_and_no_other() -> None:
    usage = (ROOT / "tests" / "bench" / "__main__.py").read_text()
    options = set(re.findall(r'"(--[a-z-]+)"', usage)) - {"--peers"}
    assert (
        set(re.findall(r"^\| `(--[a-z-]+)", PAGE.partition("## What the lines mean")[0], re.MULTILINE))
        == options
    )


@pytest.mark.parametrize("mode", modes(), ids=lambda mode: mode.name)
def test_the_target_of_every_mode_is_the_one_on_the_page(mode: Mode) -> None:
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| {mode.kind} |"))
    assert f"at most {mode.target:.1f} times" in row
