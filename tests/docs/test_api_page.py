"""docs/api.md has a command for each endpoint, and none for what is not there."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PARTS = {"{id}": "13", "{purpose}": "chat", "{model_id}": "llama3.2", "{seq}": "7"}
V1 = "/api/v1/"
pytestmark = pytest.mark.no_database


@functools.cache
def paths() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.load((ROOT / "openapi.yaml").read_text(), yaml.CSafeLoader)[
        "paths"
    ]
    return {path: item for path, item in found.items() if path.startswith(V1)}


def endpoints() -> dict[tuple[str, str], str]:
    """(method, path) of each operation, and the command that the page should have if it has none yet."""
    return {
        (method.upper(), path): command(method.upper(), path, operation)
        for path, item in paths().items()
        for method, operation in item.items()
    }


def command(method: str, path: str, operation: dict[str, Any]) -> str:
    """`curl` for one operation, with the schema's own example."""
    address = path.removeprefix(V1)
    for name, value in PARTS.items():
        address = address.replace(name, value)
    words = ["curl -s", f"-X {method}" if method != "GET" else "", f'"$API/{address}"']
    if operation.get("security") not in ([], [{}]):
        words.append('-H "$AUTH"')
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content:
        words.append(f"-H \"$JSON\" -d '{json.dumps(content['example'])}'")
    return " ".join(word for word in words if word)


def documented() -> list[tuple[str, str, list[str]]]:
    """(method, path as asked, words) of each command of the page's list."""
    part = (ROOT / "docs" / "api.md").read_text().partition("### Every endpoint, as a command")[2]
    found = []
    for line in re.findall(r"^curl .*$", re.split(r"\n##+ ", part)[0], re.MULTILINE):
        words = shlex.split(line)
        method = words[words.index("-X") + 1] if "-X" in words else "GET"
        address = next(word for word in words if word.startswith("$API/"))
        found.append((method, V1 + address.removeprefix("$API/").partition("?")[0], words))
    return found


def template(path: str) -> str:
    """The path of the schema that an asked one is; words before placeholders."""
    for known in sorted(paths(), key=lambda known: known.count("{")):
        pattern = re.sub(r"\\\{\w+\\\}", r"[^/]+", re.escape(known))
        if re.fullmatch(pattern, path):
            return known
    return f"no such path: {path}"


def test_every_endpoint_has_a_command_and_every_command_an_endpoint() -> None:
    there = {(method, template(path)) for method, path, _ in documented()}
    wanted = endpoints()

    missing = [text for key, text in wanted.items() if key not in there]
    assert not missing, "paste these into docs/api.md:\n" + "\n".join(missing)
    assert there - set(wanted) == set()


def test_the_bodies_of_commands_are_json() -> None:
    bodies = [words[words.index("-d") + 1] for _, _, words in documented() if "-d" in words]

    assert len(bodies) > 30
    assert all(isinstance(json.loads(body), dict) for body in bodies)
