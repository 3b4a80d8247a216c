"""When this worker takes no more requests: too many run, or memory runs out (R41).

Shedding begins well before the kernel would end the process, and answers at once, so that whoever balances goes elsewhere.
"""

from __future__ import annotations

import os
from pathlib import Path

from proxy.errors import Overloaded

CGROUP = Path("/sys/fs/cgroup")
SHED_ABOVE = 0.9
"""Of the limit. Envoy's overload manager stops taking requests at 95 % of its heap; ours also holds what others measure late."""
RESUME_BELOW = 0.85


class Overload:
    """`check()` before a request is taken; `measure()` once a second.

    most_running: requests at the same time. memory_limit: bytes for this process; 0 takes the limit of the container (its
    cgroup, of which all its processes are a part), where there is one.
    """

    def __init__(self, *, most_running: int, memory_limit: int = 0, cgroup: Path = CGROUP) -> None:
        self._most_running = most_running
        self._limit = memory_limit
        self._cgroup = cgroup
        self.shedding = False

    def check(self, running: int) -> None:
        """Raises Overloaded."""
        if self.shedding or running >= self._most_running:
            raise Overloaded

    def measure(self) -> None:
        """Look at the memory in use. Where nothing limits it, or nothing can be read, nothing is shed."""
        try:
            used, limit = (_resident(), self._limit) if self._limit else self._of_the_container()
        except (OSError, ValueError, IndexError):
            used, limit = 0, 0
        self.shedding = bool(limit) and used > limit * (RESUME_BELOW if self.shedding else SHED_ABOVE)

    def _of_the_container(self) -> tuple[int, int]:
        """What is used, without the pages of files that the kernel gives back by itself; and the limit, 0 for none."""
        limit = (self._cgroup / "memory.max").read_text().strip()
        if not limit.isdecimal():
            return 0, 0
        stat = dict(line.split() for line in (self._cgroup / "memory.stat").read_text().splitlines())
        used = int((self._cgroup / "memory.current").read_text()) - int(stat.get("inactive_file", 0))
        return used, int(limit)


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
