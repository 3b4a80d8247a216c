"""Loaded by every process that has this folder on its path: notes what it connects to, and answers names as it is told.

WITNESS_LOG: a file that gets a line for each connection that is begun. WITNESS_NAMES: a JSON file of names, each with the
answers to give, one after another, the last one for ever.
"""

import json
import os
import socket
import sys
from typing import Any

_log = os.open(os.environ["WITNESS_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_asked: dict[str, int] = {}
_real = socket.getaddrinfo


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect" and isinstance(arguments[1], tuple):
        os.write(_log, f"{arguments[1][0]} {arguments[1][1]}\n".encode())


def _look_up(host: Any, port: Any, *args: Any, **options: Any) -> Any:
    name = host.decode() if isinstance(host, bytes) else host
    with open(os.environ["WITNESS_NAMES"], encoding="utf-8") as file:
        known = json.load(file)
    if name not in known:
        return _real(host, port, *args, **options)
    turn = _asked[name] = _asked.get(name, -1) + 1
    addresses = known[name][min(turn, len(known[name]) - 1)]
    return [row for address in addresses for row in _real(address, port, *args, **options)]


sys.addaudithook(_note)
socket.getaddrinfo = _look_up
