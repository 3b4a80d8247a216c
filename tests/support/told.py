"""What a caller was told, read as strictly as the contract is written: the caller's ledger.

told = listen(house.url, house.key, "r-1")      # a stream, read to its end from the socket
told.check()                                    # the promises that hold for every stream, whatever happened upstream
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import urlsplit

CHAT = "/v1/chat/completions"
DONE = "[DONE]"
CLOSES_WITHIN = 2.0


@dataclass
class Told:
    """One answer. took: seconds from asking to the end; first_after: to the first byte of the body.

    whole: the body ended as HTTP says it should. closed: the server closed the connection after the answer (None: not looked).
    left: the caller went away before the end. Fill it in before reading from it: what is parsed once is kept.
    """

    name: str
    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    whole: bool = True
    closed: bool | None = None
    took: float = 0.0
    first_after: float | None = None
    left: bool = False

    @property
    def streamed(self) -> bool:
        return self.headers.get("content-type", "").startswith("text/event-stream")

    @cached_property
    def blocks(self) -> list[bytes]:
        return [block for block in self.body.split(b"\n\n") if block.strip()]

    @property
    def comments(self) -> list[bytes]:
        return [block for block in self.blocks if block.startswith(b":")]

    @cached_property
    def events(self) -> list[Any]:
        """The data of each event, `[DONE]` as that text. The last one of a stream that was cut may be half of one."""
        found: list[Any] = []
        for block in self.blocks:
            if block.startswith(b":"):
                continue
            assert block.startswith(b"data: "), (self.name, block)
            text = block.removeprefix(b"data: ").decode()
            found.append(DONE if text == DONE else json.loads(text))
        return found

    @cached_property
    def chunks(self) -> list[dict[str, Any]]:
        return [event for event in self.events if isinstance(event, dict) and "error" not in event]

    @cached_property
    def deltas(self) -> list[dict[str, Any]]:
        return [choice["delta"] for chunk in self.chunks for choice in chunk.get("choices", ())]

    @property
    def text(self) -> str:
        if self.streamed:
            return "".join(delta.get("content") or "" for delta in self.deltas)
        if self.status != 200 or self.left:
            return ""
        return str(json.loads(self.body)["choices"][0]["message"]["content"])

    @property
    def finish_reasons(self) -> list[str]:
        return [
            choice["finish_reason"]
            for chunk in self.chunks
            for choice in chunk.get("choices", ())
            if choice.get("finish_reason")
        ]

    @property
    def errors(self) -> list[dict[str, Any]]:
        if self.streamed:
            return [event["error"] for event in self.events if isinstance(event, dict) and "error" in event]
        return [json.loads(self.body)["error"]] if self.status != 200 and not self.left else []

    @property
    def code(self) -> str:
        """The code of the error that was told; nothing when there was none."""
        return str(self.errors[0]["code"]) if self.errors else ""

    @property
    def models(self) -> list[str]:
        """The models that the chunks name, each once, in order."""
        return list(dict.fromkeys(chunk["model"] for chunk in self.chunks))

    @property
    def usage(self) -> dict[str, Any] | None:
        if not self.streamed:
            return json.loads(self.body).get("usage") if self.status == 200 else None
        return next((chunk["usage"] for chunk in reversed(self.chunks) if chunk.get("usage")), None)

    @property
    def provider(self) -> str:
        return self.headers.get("x-penstock-provider", "")

    @property
    def attempts(self) -> int:
        return int(self.headers.get("x-penstock-attempts", 0))

    @property
    def ended_well(self) -> bool:
        """Whether this looks to the caller like the whole answer."""
        if self.status != 200 or not self.whole or self.left:
            return False
        return not self.streamed or self.events[-1:] == [DONE]

    def check(self, *, whole_text: str | None = None) -> None:
        """Assert what holds for every answer: told once, in one piece, to its end or with one error, and never both.

        whole_text: of the answer that the model would give. Its words are all different, so what comes twice shows.
        """
        about = (self.name, self.status, self.body[-600:])
        if not self.left:
            assert self.whole, ("the body does not end as HTTP says", *about)
        if not self.streamed:
            assert self.status == 200 or self.left or self.code, about
        elif not self.left:
            self._check_end(about)
        if self.streamed:
            self._check_chunks(about)
        twice = [word for word, count in Counter(self.text.split()).items() if count > 1]
        assert not twice, ("delivered twice", twice[:5], *about)
        if whole_text is not None:
            assert whole_text.startswith(self.text), ("not the beginning of the answer", self.text, *about)
            assert not self.ended_well or self.text == whole_text, ("a truncated success", self.text, *about)

    def _check_end(self, about: Any) -> None:
        events = self.events
        assert events.count(DONE) + len(self.errors) == 1, ("one end, no more", *about)
        assert events[-1] == DONE or "error" in events[-1], ("the end comes last", *about)
        if self.errors:
            assert not self.finish_reasons, ("a finish reason was made up", *about)
            assert events[-1]["request_id"] == self.headers["x-request-id"], about
            assert self.closed is not False, ("the connection stays open after an error", *about)
        else:
            assert len(self.finish_reasons) == 1, ("one finish reason", *about)

    def _check_chunks(self, about: Any) -> None:
        roles = sum("role" in delta for delta in self.deltas)
        assert roles == 1 or (roles == 0 and not self.chunks) or self.left, ("one role", *about)
        assert len({chunk["id"] for chunk in self.chunks}) <= 1, ("one id", *about)


def question(name: str, **body: Any) -> dict[str, Any]:
    """A chat request whose prompt is its own name, so that an upstream's ledger knows whose it was."""
    return {"messages": [{"role": "user", "content": name}], **body}


def listen(
    url: str,
    key: str,
    name: str,
    *,
    stream: bool = True,
    headers: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    **body: Any,
) -> Told:
    """Ask, read the answer to its end, and look whether the connection closes behind an error. `name` is the request's id."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=timeout)
    sent = {
        "Authorization": f"Bearer {key}",
        "Content-Type": "application/json",
        "x-request-id": name,
        **(headers or {}),
    }
    began = time.monotonic()
    connection.request("POST", CHAT, json.dumps(question(name, stream=stream, **body)), sent)
    wire = connection.sock
    assert wire is not None
    try:
        response = connection.getresponse()
        told = Told(name, response.status, {header.lower(): value for header, value in response.getheaders()})
        received = bytearray()
        try:
            while part := response.read1(65_536):
                told.first_after = told.first_after or time.monotonic() - began
                received += part
        except http.client.IncompleteRead as broken:
            received += broken.partial
            told.whole = False
        told.took = time.monotonic() - began
        told.body = bytes(received)
        if told.streamed and b'"error"' in told.body:
            told.closed = closes(wire)
        return told
    finally:
        connection.close()
        wire.close()


def closes(wire: socket.socket, within: float = CLOSES_WITHIN) -> bool:
    """Whether the peer closes this connection, and sends nothing more on it."""
    wire.settimeout(within)
    try:
        return wire.recv(1) == b""
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
