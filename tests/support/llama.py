"""A real llama.cpp server on a tiny model with random weights: the true API, meaningless words.

Always send `max_tokens`: the model hardly ever stops by itself. To make it call a tool, add `must_call_a_tool()` to a
request that carries tools.
"""

from __future__ import annotations

import http.client
import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Self

from tests.support import tiny_model
from tests.support.ports import LOOPBACK, free_port
from tests.support.processes import REPOSITORY, CannotRun, Process, StartFailed
from tests.support.tiny_model import must_call_a_tool

__all__ = ["Llama", "must_call_a_tool"]
STARTS = 3


class Llama:
    """A running server. As a context manager it stops at the end.

    key: the API key it asks for (None: none). alias: the model's name. embeddings: answers /v1/embeddings (such a server
    does not chat well). seed: another one gives another model. parallel: how many requests it works on at once.
    """

    def __init__(
        self,
        *,
        alias: str = "tiny",
        key: str | None = None,
        embeddings: bool = False,
        parallel: int = 4,
        seed: int = 0,
    ) -> None:
        if importlib.util.find_spec("xllamacpp") is None:
            raise CannotRun("llama.cpp cannot run here: the wheel `xllamacpp` is not installed")
        self.alias = alias
        self.key = key
        self._model = model_file(seed)
        self._flags = [
            f"--alias={alias}",
            f"--parallel={parallel}",
            *([f"--key={key}"] if key else []),
            *(["--embeddings"] if embeddings else []),
        ]
        self._process: Process | None = None
        self.port = 0
        self._start_on_a_free_port()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """Where it listens, without a path; an OpenAI client wants `url + "/v1"`."""
        return f"http://{LOOPBACK}:{self.port}"

    @property
    def process(self) -> Process:
        if self._process is None:
            raise CannotRun("this llama.cpp server was stopped")
        return self._process

    def start(self) -> None:
        """Start it on the port it has, at first or again after `stop` or `kill`."""
        script = Path(__file__).with_name("llama_process.py")
        self._process = Process(
            [sys.executable, script, self._model, f"--port={self.port}", *self._flags],
            name="llama.cpp",
            cwd=REPOSITORY,
        )
        self._process.wait_until(self.healthy, timeout=20)

    def healthy(self) -> bool:
        """What /health says: false while the model is loading."""
        connection = http.client.HTTPConnection(LOOPBACK, self.port, timeout=2)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def pause(self) -> None:
        self.process.pause()

    def resume(self) -> None:
        self.process.resume()

    def kill(self) -> None:
        self.process.kill()

    def restart(self) -> None:
        """Kill it and start it again on the same port."""
        self.kill()
        self.start()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop(timeout=3)
            self._process = None

    def _start_on_a_free_port(self) -> None:
        for attempt in range(1, STARTS + 1):
            self.port = free_port()
            try:
                return self.start()
            except StartFailed:
                if attempt == STARTS:
                    raise
        return None


def model_file(seed: int = 0) -> Path:
    """The model's file, written once for each user, text of its recipe and seed; safe when many processes ask at once."""
    recipe = Path(tiny_model.__file__).stat()
    folder = Path(tempfile.gettempdir()) / f"penstock-models-{os.geteuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if status.st_uid != os.geteuid() or folder.is_symlink() or status.st_mode & 0o077:
        raise CannotRun(f"llama.cpp cannot run here: {folder} is not ours alone")
    path = folder / f"tiny-{recipe.st_mtime_ns}-{seed}.gguf"
    if not path.exists():
        handle, fresh = tempfile.mkstemp(dir=folder, suffix=".new")
        os.close(handle)
        tiny_model.write(Path(fresh), seed=seed).rename(path)
    return path
