"""The product as an attacker meets it, with a witness in each of its processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from tests.proxy.conftest import fallback, house, pair, upstream
from tests.support.gateway import Gateway

__all__ = ["fallback", "house", "pair", "upstream"]

WITNESS = Path(__file__).parent / "witness"
PASSWORD = "correct horse battery"


@dataclass(frozen=True)
class Witness:
    """What every process of a gateway connected to, and what names mean to it."""

    folder: Path

    @property
    def env(self) -> dict[str, str]:
        return {
            "PYTHONPATH": str(WITNESS),
            "WITNESS_LOG": str(self.folder / "connections"),
            "WITNESS_NAMES": str(self.folder / "names"),
        }

    def know(self, **names: list[list[str]]) -> None:
        text = json.dumps({name.replace("_", "."): answers for name, answers in names.items()})
        (self.folder / "names").write_text(text)

    def connections(self) -> set[tuple[str, int]]:
        log = self.folder / "connections"
        lines = log.read_text().splitlines() if log.exists() else []
        return {(line.split()[0], int(line.split()[1])) for line in lines}


@pytest.fixture(scope="module")
def witness(tmp_path_factory: pytest.TempPathFactory) -> Witness:
    made = Witness(tmp_path_factory.mktemp("witness"))
    made.know()
    return made


@pytest.fixture(scope="module")
def administrator() -> Callable[[Gateway], httpx.Client]:
    """Make an administrator in a gateway, and answer a client of its API with the token."""
    return log_in


def make_root(gateway: Gateway) -> None:
    """An administrator called root."""
    gateway.shell(
        "from django.contrib.auth.models import User\n"
        "from audit.changes import changes\n"
        "with changes(actor=None, via='system'):\n"
        f"    User.objects.create_superuser('root', 'root@example.com', {PASSWORD!r})\n"
    )


def log_in(gateway: Gateway) -> httpx.Client:
    make_root(gateway)
    with gateway.client() as client:
        answer = client.post("/api/v1/auth/token", json={"username": "root", "password": PASSWORD})
    return gateway.client(answer.json()["access"])


@pytest.fixture(scope="module")
def plain() -> Iterator[Gateway]:
    """The web process alone, as `manage.py serve` starts it."""
    with Gateway() as running:
        yield running


@pytest.fixture(scope="module")
def root(plain: Gateway) -> Iterator[httpx.Client]:
    with log_in(plain) as client:
        yield client


def statuses(answer: bytes) -> list[int]:
    """The statuses of all responses in what a connection gave."""
    import re

    return [int(found) for found in re.findall(rb"HTTP/1\.[01] (\d{3}) ", answer)]


def rss(pid: int) -> float:
    """Resident memory in units of a million bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024 / 1e6
