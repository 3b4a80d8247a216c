"""A worker that has too much to do says so at once, and takes requests again when it has less."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import httpx
import pytest

from proxy.errors import Overloaded
from proxy.overload import Overload
from tests.support import answers
from tests.support.inprocess import House
from tests.support.upstream import Upstream

pytestmark = pytest.mark.no_database

MIB = 2**20


@pytest.fixture
def cgroup(tmp_path: Path) -> Path:
    (tmp_path / "memory.max").write_text(f"{512 * MIB}\n")
    use(tmp_path, 100 * MIB)
    return tmp_path


def use(cgroup: Path, used: int, *, files: int = 0) -> None:
    (cgroup / "memory.current").write_text(f"{used + files}\n")
    (cgroup / "memory.stat").write_text(f"anon {used}\ninactive_file {files}\nslab 0\n")


def sheds(overload: Overload) -> bool:
    overload.measure()
    return overload.shedding


def test_r41_memory_near_the_containers_limit_sheds_until_there_is_room_again(cgroup: Path) -> None:
    overload = Overload(most_running=10, cgroup=cgroup)
    assert not sheds(overload)
    use(cgroup, 470 * MIB)
    assert sheds(overload)
    with pytest.raises(Overloaded):
        overload.check(0)
    use(cgroup, 450 * MIB)
    assert sheds(overload)  # not at once, or it would flicker
    use(cgroup, 400 * MIB)
    assert not sheds(overload)
    overload.check(0)


def test_what_the_kernel_keeps_of_files_is_no_memory_of_ours(cgroup: Path) -> None:
    use(cgroup, 100 * MIB, files=400 * MIB)
    assert not sheds(Overload(most_running=10, cgroup=cgroup))


@pytest.mark.parametrize("limit", ["max", "", "nonsense"])
def test_without_a_limit_nothing_is_shed(cgroup: Path, limit: str) -> None:
    (cgroup / "memory.max").write_text(limit)
    use(cgroup, 2**40)
    assert not sheds(Overload(most_running=10, cgroup=cgroup))


def test_where_there_is_no_cgroup_nothing_is_shed(tmp_path: Path) -> None:
    assert not sheds(Overload(most_running=10, cgroup=tmp_path))


def test_a_limit_of_ones_own_is_held_against_this_process(tmp_path: Path) -> None:
    assert sheds(Overload(most_running=10, memory_limit=MIB, cgroup=tmp_path))
    assert not sheds(Overload(most_running=10, memory_limit=2**40, cgroup=tmp_path))


async def test_r41_one_request_too_many_is_refused_at_once_and_the_others_go_on(
    pair: House, upstream: Upstream
) -> None:
    upstream.behave(answers.ok(first_after=1.5))
    pair.gateway.overload = Overload(most_running=3)
    question = {"messages": [{"role": "user", "content": "hello"}]}
    async with httpx.AsyncClient(
        base_url=pair.url, headers={"Authorization": f"Bearer {pair.key}"}, timeout=10
    ) as client:
        running = [asyncio.create_task(client.post("/v1/chat/completions", json=question)) for _ in range(3)]
        while pair.registry.running < 3:
            await asyncio.sleep(0.005)
        began = time.monotonic()
        refused = await client.post("/v1/chat/completions", json=question)
        assert time.monotonic() - began < 1.2
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
        assert int(refused.headers["retry-after"]) >= 1
        assert [(await each).status_code for each in running] == [200, 200, 200]
        assert (await client.post("/v1/chat/completions", json=question)).status_code == 200
