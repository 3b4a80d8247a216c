"""`file:///path`: the content of a regular file, such as a secret that an orchestrator mounts."""

from __future__ import annotations

import asyncio
import os
import stat
from pathlib import Path
from urllib.parse import unquote

from django.conf import settings

from providers.crypto import Secret
from providers.errors import CredentialUnavailable

MAX_BYTES = 65_536
_NEVER = (Path("/proc"), Path("/sys"), Path("/dev"))
"""The kernel's files tell of this process, its environment included."""


class FileStore:
    async def read(self, reference: str) -> Secret:
        # Mounted secrets may lie on a network file system, which must not hold up the loop.
        return await asyncio.to_thread(_read, unquote(reference))


def _read(name: str) -> Secret:
    try:
        path = Path(name).resolve(strict=True) if name.startswith("/") and "\0" not in name else None
        if path is None:
            raise CredentialUnavailable(detail="file:// needs an absolute path")
        if any(path.is_relative_to(place) for place in (*_NEVER, *_own_places())):
            raise CredentialUnavailable(detail="file:// never reads the gateway's own files")
        data = _content(path)
        value = data.decode().strip()
    except (OSError, UnicodeDecodeError, RuntimeError) as error:
        raise CredentialUnavailable(detail=f"the file cannot be read: {type(error).__name__}") from error
    if not value:
        raise CredentialUnavailable(detail="the file is empty")
    return Secret(value)


def _content(path: Path) -> bytes:
    """Without blocking on a pipe that took the file's place, and without reading a huge one."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise CredentialUnavailable(detail="file:// needs a regular file")
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise CredentialUnavailable(detail=f"the file is above {MAX_BYTES} bytes")
    return data


def _own_places() -> list[Path]:
    """Our data, and the files that hold our own secrets (`NAME_FILE`, the file of settings)."""
    named = [value for name, value in os.environ.items() if name.endswith("_FILE") or name == "ENV_FILE"]
    files = [*named, str(Path(settings.BASE_DIR) / ".env"), str(settings.DATA_DIR)]
    return [Path(name).resolve() for name in files if name.startswith("/")]
