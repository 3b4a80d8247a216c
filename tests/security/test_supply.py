"""R57: what runs when Python starts, and what is dialled when the product starts."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from tests.security.conftest import Witness
from tests.support.gateway import Gateway
from tests.support.ports import free_port
from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.no_database

# Lines of code in .pth files run whenever Python starts. These are known: setuptools' shim, and coverage's hook.
KNOWN = {"distutils-precedence.pth", "a1_coverage.pth"}


def test_r57_no_unexpected_code_runs_when_python_starts() -> None:
    folder = Path(sysconfig.get_paths()["purelib"])
    owned = {
        str(Path(str(file.locate())).resolve())
        for distribution in importlib.metadata.distributions(path=[str(folder)])
        for file in distribution.files or ()
        if file.name.endswith(".pth")
    }
    for path in folder.glob("*.pth"):
        assert str(path.resolve()) in owned or path.name in KNOWN, f"{path.name} belongs to no package"
        code = [line for line in path.read_text().splitlines() if line.startswith(("import ", "import\t"))]
        assert not code or path.name in KNOWN, f"{path.name} runs {code}"


def test_r57_starting_dials_nobody(witness: Witness) -> None:
    """Neither importing the product nor serving it asks anybody anything."""
    with Gateway(env=witness.env, programs=["drainer"], database="sqlite") as gateway:
        assert gateway.ready()
        gateway.manage("check")
        assert witness.connections() == set()


def cannot_isolate() -> bool:
    unshare = shutil.which("unshare")
    if unshare is None:
        return True
    done = subprocess.run([unshare, "--net", "true"], capture_output=True, check=False)
    return done.returncode != 0


@pytest.mark.skipif(cannot_isolate(), reason="this machine allows no network namespaces")
def test_r57_it_starts_with_no_route_to_anywhere() -> None:
    """In a network of its own that has only loopback."""
    with Gateway(start=False, database="sqlite") as gateway:
        port = free_port()
        script = (
            "ip link set lo up 2>/dev/null || exit 77\n"
            f'"{sys.executable}" manage.py serve --port {port} & server=$!\n'
            f'"{sys.executable}" - <<EOF\n'
            "import time, urllib.request\n"
            "for _ in range(200):\n"
            "    try:\n"
            f"        print(urllib.request.urlopen('http://127.0.0.1:{port}/readyz').status)\n"
            "        break\n"
            "    except OSError:\n"
            "        time.sleep(0.1)\n"
            "EOF\n"
            "kill $server; wait $server\n"
        )
        done = subprocess.run(
            ["unshare", "--net", "sh", "-c", script],
            cwd=REPOSITORY,
            env=gateway.env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    if done.returncode == 77:
        pytest.skip("loopback cannot be brought up without the ip command")
    assert "200" in done.stdout, done.stderr[-2000:]
