"""A small ASGI application behind the real server, as a process of its own: `python toy_server.py '<json>'`.

The one argument holds `limits` (fields of Limits), `workers`, `fail` (start-up fails with this message) and `notes` (a folder
in which each process leaves a file `started-<id>`, or `failed-<id>` while there is one called `away`).
The port is printed as the first line.
"""

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from config.connection import Limits
from config.server import Config, Server, bind
from config.workers import Workers
from providers.hardening import harden_process

OPTIONS: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}


class ToyDrain:
    """Counts streams and tells them to stop."""

    def __init__(self) -> None:
        self.running = 0
        self.started = False
        self.interrupted = asyncio.Event()

    def start(self) -> None:
        self.started = True

    def interrupt(self) -> None:
        self.interrupted.set()


drain = ToyDrain()
seen: dict[str, int] = {"requests": 0, "left": 0}


async def application(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        await lifespan(receive, send)
    elif scope["type"] == "websocket":
        await websocket(receive, send)
    else:
        await http(scope, receive, send)


async def lifespan(receive: Any, send: Any) -> None:
    await receive()
    if "raise" in OPTIONS:
        raise RuntimeError(OPTIONS["raise"])
    if "fail" in OPTIONS:
        await send({"type": "lifespan.startup.failed", "message": OPTIONS["fail"]})
        return
    if "notes" in OPTIONS:
        notes = Path(OPTIONS["notes"])
        away = (notes / "away").exists()
        (notes / f"{'failed' if away else 'started'}-{os.getpid()}").touch()
        if away:
            await send({"type": "lifespan.startup.failed", "message": "the database is away"})
            return
    await send({"type": "lifespan.startup.complete"})
    await receive()
    print("lifespan ended", flush=True)
    await send({"type": "lifespan.shutdown.complete"})


async def websocket(receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "websocket.accept"})
    while True:
        message = await receive()
        if message["type"] == "websocket.disconnect":
            return
        if message.get("text") == "flood":
            while True:
                await send({"type": "websocket.send", "bytes": b"x" * 65536})
        await send({"type": "websocket.send", "text": message["text"]})


async def http(scope: Any, receive: Any, send: Any) -> None:
    if scope["path"] != "/seen":
        seen["requests"] += 1
    page = PAGES.get(scope["path"], echo)
    await page(scope, receive, send)


async def answer(send: Any, status: int, data: Any) -> None:
    body = json.dumps(data).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def echo(scope: Any, receive: Any, send: Any) -> None:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            seen["left"] += 1
            return
        body += message["body"]
        if not message["more_body"]:
            break
    data = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [[name.decode(), value.decode()] for name, value in scope["headers"]],
        "client": scope["client"],
        "body": body[:100].decode(),
        "size": len(body),
        "draining": drain.started,
    }
    await answer(send, 200, data)


async def unread(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, 401, {"error": "who are you"})


async def broken(scope: Any, receive: Any, send: Any) -> None:
    raise ValueError("a secret detail")


BAD_HEADERS = {
    b"line-break": (b"x-a", b"b\r\nx-c: d"),
    b"bare-lf": (b"x-a", b"b\nx-c: d"),
    b"bare-cr": (b"x-a", b"b\rx"),
    b"nul": (b"x-a", b"b\0"),
    b"space": (b"x a", b"b"),
    b"colon": (b"x:a", b"b"),
    b"no-name": (b"", b"b"),
}


async def bad_header(scope: Any, receive: Any, send: Any) -> None:
    """`/bad-header?name`: an answer with that header."""
    headers = [BAD_HEADERS[scope["query_string"]], (b"content-length", b"0")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def length(scope: Any, receive: Any, send: Any) -> None:
    """`/length?5`: an answer that says it has this many bytes, and has 3."""
    headers = [(b"Content-Length", scope["query_string"])]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": b"abc"})


async def what_was_seen(scope: Any, receive: Any, send: Any) -> None:
    await answer(send, 200, {**seen, "running": drain.running})


async def stream(scope: Any, receive: Any, send: Any) -> None:
    """`/stream?20`: that many events, one every 50 ms, or one error event when interrupted."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    drain.running += 1
    try:
        for number in range(int(scope["query_string"])):
            if drain.interrupted.is_set():
                break
            await send({"type": "http.response.body", "body": b"data: %d\n\n" % number, "more_body": True})
            await asyncio.sleep(0.05)
        last = b"data: server_shutting_down\n\n" if drain.interrupted.is_set() else b"data: [DONE]\n\n"
        await send({"type": "http.response.body", "body": last})
    finally:
        drain.running -= 1


async def stubborn(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
    try:
        await asyncio.sleep(3600)
    except asyncio.CancelledError:
        print("cancelled", flush=True)
        raise


async def thread(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"data: 0\n\n", "more_body": True})
    await asyncio.to_thread(time.sleep, 3600)


async def flood(scope: Any, receive: Any, send: Any) -> None:
    """Send until the reader is gone, and note it."""
    await send({"type": "http.response.start", "status": 200, "headers": []})
    leaving = asyncio.ensure_future(gone(receive))
    while not leaving.done():
        await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
        await asyncio.sleep(0)
    seen["left"] += 1


async def silent(scope: Any, receive: Any, send: Any) -> None:
    """Answer nothing until the caller is gone, and note it."""
    await gone(receive)
    seen["left"] += 1


async def gone(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


PAGES = {
    "/seen": what_was_seen,
    "/unread": unread,
    "/broken": broken,
    "/bad-header": bad_header,
    "/length": length,
    "/silent": silent,
    "/stream": stream,
    "/stubborn": stubborn,
    "/flood": flood,
    "/thread": thread,
}


def main() -> None:
    harden_process()
    sock = bind("127.0.0.1", OPTIONS.get("port", 0))
    print(sock.getsockname()[1], flush=True)
    config = Config(
        application, limits=Limits(**OPTIONS.get("limits", {})), trusted_proxies=OPTIONS.get("trusted", ())
    )

    def work() -> None:
        Server(config, drain=drain).run(sockets=[sock])

    if OPTIONS.get("workers", 1) == 1:
        work()
    else:
        sys.exit(Workers(work, count=OPTIONS["workers"], sock=sock).run())


if __name__ == "__main__":
    main()
