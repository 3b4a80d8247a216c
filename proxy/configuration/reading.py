"""Text into a document: JSON, YAML and CSV, within bounds, with the line of every entry.

Which of them it is, is seen from the text. JSON begins with a bracket, CSV with its header; everything else is YAML.
"""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from audit.strict_json import StrictJSONError, loads

MAX_BYTES = 64 * 1024 * 1024
"""Of a file that the machine's administrator imports; what comes over the network is bounded before it gets here."""

MAX_YAML_BYTES = 4 * 1024 * 1024
MAX_YAML_EVENTS = 500_000
MAX_YAML_DEPTH = 40
MAX_YAML_VALUES = 500_000
"""Values when every alias is written out, which is what they cost later (a billion laughs fit into a few lines)."""

CSV_HEADER = ("provider", "key_name", "api_key", "weight", "enabled")
_UNFIT = re.compile("[\x00\ud800-\udfff]")
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Place = tuple[str, int]


class Unreadable(Exception):
    """The text is no document. The message is one sentence, with the line where there is one, and repeats nothing of it."""


@dataclass(frozen=True, slots=True)
class Text:
    """What a text holds, and in which line (from 1) each entry of each list begins, as far as that is known.

    csv: whether its entries are the rows of a CSV file.
    """

    value: Any
    lines: Mapping[Place, int] = field(default_factory=dict)
    csv: bool = False


def read(body: bytes, *, counted: bool = True) -> Text:
    """Read a text of unknown kind. Raises Unreadable. counted: as for `strict_json.loads`."""
    if len(body) > MAX_BYTES:
        raise Unreadable(f"The file is above {MAX_BYTES // 1024**2} MiB.")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable("The file is not UTF-8.") from error
    if "\0" in text:
        raise Unreadable("The file has a NUL character.")
    if text.lstrip()[:1] in {"{", "["}:
        return _json(text, counted=counted)
    if _is_csv(text):
        return _csv(text)
    return _yaml(text)


# -- JSON --------------------------------------------------------------------------------------------------------------


def _json(text: str, *, counted: bool) -> Text:
    try:
        value = loads(text.encode(), counted=counted)
    except StrictJSONError as error:
        raise Unreadable(str(error)) from error
    return Text(value, _JsonLines(text))


class _JsonLines(Mapping[Place, int]):
    """The lines of a JSON document's entries, found out when somebody asks: only a document with mistakes needs them."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._found: dict[Place, int] | None = None

    def __getitem__(self, place: Place) -> int:
        if self._found is None:
            self._found = dict(_json_lines(self._text))
        return self._found[place]

    def __iter__(self) -> Iterator[Place]:
        return iter(dict(_json_lines(self._text)))

    def __len__(self) -> int:
        return len(dict(_json_lines(self._text)))


def _json_lines(text: str) -> Iterator[tuple[Place, int]]:
    """The line of each object in a list of the outermost object. The text is known to be good."""
    depth, section, index, expecting_key = 0, "", 0, False
    line, position, length = 1, 0, len(text)
    while position < length:
        char = text[position]
        if char == "\n":
            line += 1
        elif char == '"':
            _, end = json.decoder.scanstring(text, position + 1)  # type: ignore[attr-defined]
            if depth == 1 and expecting_key:
                section, index, expecting_key = text[position + 1 : end - 1], 0, False
            position = end
            continue
        elif char in "{[":
            if depth == 2 and char == "{":
                yield (section, index), line
                index += 1
            depth += 1
            expecting_key = expecting_key or depth == 1
        elif char in "}]":
            depth -= 1
        elif char == "," and depth == 1:
            expecting_key = True
        position += 1


# -- CSV ---------------------------------------------------------------------------------------------------------------


def _is_csv(text: str) -> bool:
    first = next(csv.reader([text.lstrip().partition("\n")[0]]), [])
    return {"provider", "api_key"} <= {name.strip().lower() for name in first}


def _csv(text: str) -> Text:
    rows: list[dict[str, str]] = []
    lines: dict[Place, int] = {}
    reader = csv.reader(io.StringIO(text), strict=True)
    header: list[str] = []
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(cells)
                continue
            lines["", len(rows)] = reader.line_num
            rows.append(_cells(header, cells, reader.line_num))
    except csv.Error as error:
        raise Unreadable(f"Line {reader.line_num} is not CSV.") from error
    return Text(rows, lines, csv=True)


def _header(cells: list[str]) -> list[str]:
    header = [cell.strip().lower() for cell in cells]
    if len(set(header)) != len(header) or not set(header) <= set(CSV_HEADER) or "key_name" not in header:
        raise Unreadable(f"The header of the CSV file is not {','.join(CSV_HEADER)}.")
    return header


def _cells(header: list[str], cells: list[str], line: int) -> dict[str, str]:
    """A row as an object; "" is the name of what has no column."""
    row = dict(zip(header, (cell.strip() for cell in cells), strict=False))
    if len(cells) != len(header):
        row[""] = str(len(cells))
    return row


# -- YAML --------------------------------------------------------------------------------------------------------------


def _yaml(text: str) -> Text:
    if len(text) > MAX_YAML_BYTES:
        raise Unreadable(f"The file is above {MAX_YAML_BYTES // 1024**2} MiB; write JSON.")
    try:
        _check_events(text)
        loader = _Loader(text)
        try:
            root = loader.get_single_node()
            _check_values(root)
            value = loader.construct_document(root) if root is not None else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise Unreadable(f"The file is not YAML{f', line {mark.line + 1}' if mark else ''}.") from error
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError, TypeError) as error:
        raise Unreadable("The file is not YAML, or has a value that nobody can read.") from error
    return Text(_plain(value), dict(_yaml_lines(root)))


def _check_events(text: str) -> None:
    """Before anything is built: how deep and how many. Reading events takes no recursion."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_YAML_DEPTH:
            raise Unreadable("The file is nested too deeply.")
        if count > MAX_YAML_EVENTS:
            raise Unreadable("The file has too many values.")


def _check_values(root: yaml.Node | None) -> None:
    """How many values there are with every alias written out; also keys that stand twice, and aliases to themselves."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node, inside: tuple[int, ...]) -> int:
        if id(node) in inside:
            raise Unreadable(f"Line {node.start_mark.line + 1} contains itself.")
        if len(inside) > MAX_YAML_DEPTH:
            raise Unreadable(f"Line {node.start_mark.line + 1} is nested too deeply.")
        if id(node) not in sizes:
            children = _children(node)
            sizes[id(node)] = 1 + sum(size(child, (*inside, id(node))) for child in children)
        if sizes[id(node)] > MAX_YAML_VALUES:
            raise Unreadable("The file has too many values, with its aliases written out.")
        return sizes[id(node)]

    if root is not None:
        size(root, ())


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(names)) != len(names):
            raise Unreadable(f"Line {node.start_mark.line + 1}: an object has the same key twice.")
        return [child for pair in node.value for child in pair]
    return []


def _yaml_lines(root: yaml.Node | None) -> Iterator[tuple[Place, int]]:
    pairs = root.value if isinstance(root, yaml.MappingNode) else [(None, root)]
    for key, value in pairs:
        if isinstance(value, yaml.SequenceNode):
            for index, item in enumerate(value.value):
                yield (str(key.value) if key is not None else "", index), item.start_mark.line + 1


def _plain(value: Any) -> Any:
    """JSON values only: dates become text, and what JSON has no word for is refused."""
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            raise Unreadable("Every key of an object is text; put numbers, yes and no in quotes.")
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime.datetime | datetime.date):
        return value.isoformat()
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):  # noqa: PLR0124
        raise Unreadable("NaN and infinity are no numbers that a configuration has.")
    if isinstance(value, str) and _UNFIT.search(value):
        raise Unreadable("A text has a NUL character or half of a surrogate pair.")
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise Unreadable("The file has a value of a kind that JSON does not have.")
