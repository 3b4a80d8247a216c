"""Files into a `Source`: our own documents, and what other systems write, told apart by what is in them.

    providers.yaml        providers: [{name, slug, kind, base_url, models, api_key | api_key_ref, enabled}]
    api_keys.csv          provider,key_name,api_key,weight,enabled
    config_backup.json    the same list of providers, with the names its API has, and model_routes with nodes by api_id

What is wrong is collected with its place; nothing of a value is ever repeated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from django.utils.text import slugify

from providers.keys import DEFAULT_NAME
from providers.models import ApiKey, Provider
from proxy.configuration.document import FORMAT, Document
from proxy.configuration.reading import Place, Text, Unreadable

REFERENCE = re.compile(r"[a-z]+://.+")
FERNET = re.compile(r"gAAAA[\w=-]{60,}")
"""A key as other systems encrypt it. Its key is theirs, so here it opens nothing."""

PROVIDER = ("name", "slug", "kind", "base_url", "enabled", "priority", "custom_headers", "metadata")
USES = ("use_for_chat", "use_for_embeddings", "use_for_reranking", "model_path")
ALIASES = {"is_active": "enabled", "server_type": "kind"}
TOLD = frozenset(
    [
        "id",
        "status",
        "health_status",
        "status_code",
        "detail",
        "latency_ms",
        "last_tested_at",
        "last_health_check",
        "consecutive_failures",
        "is_healthy",
        "models_count",
        "masked_key",
        "created_at",
        "updated_at",
        "created_by",
    ]
)
"""What those systems found out by themselves; it is left out without a word."""
ENCRYPTED = frozenset({"encrypted_api_key", "api_key_encrypted"})
ROUTE = ("name", "mode", "strategy", "is_active", "config")
NODE = ("models", "strategy", "weight", "priority", "metadata")
YES, NO = frozenset({"true", "1", "yes"}), frozenset({"false", "0", "no"})


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong. place: `line 3`, or `providers.2` where no line is known."""

    place: str
    field: str
    message: str

    def __str__(self) -> str:
        where = ", ".join(word for word in (self.place, self.field) if word)
        return f"{where}: {self.message}" if where else self.message


@dataclass(slots=True)
class Source:
    """A document, and where its entries stand in the file that it was read from.

    origin: the place in the file of an entry that was made of something else. words: how the file calls our fields.
    """

    document: Document
    lines: Mapping[Place, int] = field(default_factory=dict)
    origin: dict[Place, Place] = field(default_factory=dict)
    words: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def place(self, section: str, index: int) -> str:
        place = self.origin.get((section, index), (section, index))
        try:
            return f"line {self.lines[place]}"
        except KeyError:
            return f"{place[0]}.{place[1]}" if place[0] else str(place[1])

    def word(self, section: str, name: str) -> str:
        return self.words.get(section, {}).get(name, name)

    def add(self, section: str, entry: Document, *, of: Place) -> None:
        entries = self.document.setdefault(section, [])
        self.origin[section, len(entries)] = of
        entries.append(entry)


def source_of(text: Text) -> Source:
    """The document in a text. Raises Unreadable when there is none, or one of a newer format."""
    value = text.value
    if text.csv:
        return _keys(text)
    if isinstance(value, Mapping) and "format" in value:
        _check_format(value["format"])
        return Source(dict(value), text.lines)
    if isinstance(value, list):
        value = {"providers": value}
        text = Text(value, {("providers", index): line for (_, index), line in text.lines.items()})
    if isinstance(value, Mapping) and value.keys() & {"providers", "model_routes", "routes"}:
        return _other(value, text.lines)
    raise Unreadable(
        f"This is no configuration: it has neither `format: {FORMAT}` nor a list of providers, and is no table of API keys."
    )


def _check_format(found: Any) -> None:
    name, number = FORMAT.split("/")
    match = re.fullmatch(rf"{name}/(\d{{1,6}})", found) if isinstance(found, str) else None
    if match is None:
        raise Unreadable(f"The format of this file is unknown; this version reads {FORMAT}.")
    if int(match[1]) > int(number):
        raise Unreadable(
            f"This file has the format {match[0]}, and this version of Penstock reads up to {FORMAT}. Upgrade first."
        )


# -- a table of keys ---------------------------------------------------------------------------------------------------


def _keys(text: Text) -> Source:
    source = Source({}, text.lines, words={"api_keys": {"name": "key_name", "secret": "api_key"}})
    for index, row in enumerate(text.value):
        wrong = _Wrong(source, ("", index))
        if "" in row:
            wrong("", "The row has more or fewer columns than the header.")
            continue
        entry: Document = {"provider": row["provider"], "name": row["key_name"], "secret": row["api_key"]}
        for theirs, ours in (("provider", "provider"), ("key_name", "name"), ("api_key", "secret")):
            if not entry[ours]:
                wrong(theirs, "This field is required.")
        _read_weight(row.get("weight", ""), entry, wrong)
        _read_enabled(row.get("enabled", ""), entry, wrong)
        source.add("api_keys", entry, of=("", index))
    return source


def _read_weight(text: str, entry: Document, wrong: _Wrong) -> None:
    if not text:
        return
    if text.isascii() and text.isdigit() and len(text) < 10:
        entry["weight"] = int(text)
    else:
        wrong("weight", "Write a whole number.")


def _read_enabled(text: str, entry: Document, wrong: _Wrong) -> None:
    if text.lower() in YES | NO:
        entry["enabled"] = text.lower() in YES
    elif text:
        wrong("enabled", "Write true or false.")


@dataclass(frozen=True, slots=True)
class _Wrong:
    """Notes what is wrong with one entry of the file."""

    source: Source
    of: Place

    def __call__(self, name: str, message: str) -> None:
        place = self.of if self.of in self.source.lines else None
        text = f"line {self.source.lines[self.of]}" if place else f"{self.of[0]}.{self.of[1]}"
        self.source.problems.append(Problem(text, name[:100], message))


# -- lists of providers and routes -------------------------------------------------------------------------------------


def _other(value: Mapping[str, Any], lines: Mapping[Place, int]) -> Source:
    words = {"api_keys": {"secret": "api_key"}, "models": {"name": "models"}}
    source = Source({}, lines, words=words)
    slugs: dict[Any, str] = {}
    for section, convert in (("providers", _provider), ("model_routes", _route), ("routes", _route)):
        for index, item in enumerate(_items(value, section, source)):
            wrong = _Wrong(source, (section, index))
            if isinstance(item, Mapping):
                convert(item, source, wrong, slugs)
            else:
                wrong("", "Write an object.")
    return source


def _items(value: Mapping[str, Any], section: str, source: Source) -> list[Any]:
    items = value.get(section) or []
    if not isinstance(items, list):
        source.problems.append(Problem("", section, "Write a list."))
        return []
    return items


def _provider(item: Mapping[str, Any], source: Source, wrong: _Wrong, slugs: dict[Any, str]) -> None:
    entry = {name: item[name] for name in (*PROVIDER, *USES) if item.get(name) is not None}
    entry |= {ours: item[theirs] for theirs, ours in ALIASES.items() if item.get(theirs) is not None}
    known = {*PROVIDER, *USES, *ALIASES, *TOLD, *ENCRYPTED, "models", "api_key", "api_key_ref"}
    _refuse_unknown(item, known, wrong)
    name = entry.get("name")
    if not isinstance(name, str) or not name.strip():
        wrong("name", "This field is required.")
        return
    slug = entry.setdefault("slug", _slug(name))
    if not isinstance(slug, str) or not slug:
        wrong("slug", "Write text.")
        return
    slugs[item.get("id")] = slug
    source.add("providers", entry, of=wrong.of)
    _key_of(item, slug, source, wrong)
    for model in _models(item, wrong):
        source.add("models", {"provider": slug, "name": model}, of=wrong.of)


def _slug(name: str) -> str:
    stored = (
        Provider.objects.filter(name=name).values_list("slug", flat=True).first()
        if "\0" not in name
        else None
    )
    return stored or slugify(name)[:63].strip("-_")


def _key_of(item: Mapping[str, Any], slug: str, source: Source, wrong: _Wrong) -> None:
    plain, reference = item.get("api_key") or "", item.get("api_key_ref") or ""
    if plain and reference:
        wrong("api_key_ref", "Write api_key or api_key_ref, not both.")
        return
    if reference and not (isinstance(reference, str) and REFERENCE.fullmatch(reference)):
        wrong("api_key_ref", "Write env://NAME or file:///path.")
        return
    if any(item.get(name) for name in ENCRYPTED) or (isinstance(plain, str) and FERNET.fullmatch(plain)):
        source.notes.append(
            f"{source.place(*wrong.of)}: the key is encrypted by the other system; enter it here"
        )
        return
    if plain or reference:
        entry = {"provider": slug, "name": _key_name(slug), "secret": reference or plain}
        source.add("api_keys", entry, of=wrong.of)


def _key_name(slug: str) -> str:
    stored = (
        ApiKey.objects.filter(provider__slug=slug, is_default=True).values_list("name", flat=True).first()
    )
    return stored or DEFAULT_NAME


def _models(item: Mapping[str, Any], wrong: _Wrong) -> list[str]:
    listed = item.get("models") or []
    found = [_model_name(each) for each in listed] if isinstance(listed, list) else [""]
    names = [name for name in found if isinstance(name, str) and name]
    if names != found or len(set(names)) != len(names):
        wrong("models", "Write a list of names, each of them once.")
        return []
    return names


def _model_name(each: Any) -> Any:
    return (each.get("id") or each.get("name")) if isinstance(each, Mapping) else each


def _route(item: Mapping[str, Any], source: Source, wrong: _Wrong, slugs: dict[Any, str]) -> None:
    _refuse_unknown(item, {*ROUTE, "enabled", "nodes", *TOLD}, wrong)
    entry = {name: item[name] for name in ROUTE if item.get(name) is not None}
    if item.get("enabled") is not None:
        entry["is_active"] = item["enabled"]
    nodes = item.get("nodes") or []
    if not isinstance(nodes, list) or not all(isinstance(node, Mapping) for node in nodes):
        wrong("nodes", "Write a list of objects.")
        return
    entry["nodes"] = [_node(node, f"nodes.{index}", wrong, slugs) for index, node in enumerate(nodes)]
    source.add("model_routes", entry, of=wrong.of)


def _node(node: Mapping[str, Any], place: str, wrong: _Wrong, slugs: dict[Any, str]) -> Document:
    _refuse_unknown(
        node,
        {*NODE, *TOLD, "provider", "provider_id", "api_id"},
        lambda name, text: wrong(f"{place}.{name}", text),
    )
    slug = node.get("provider")
    if slug is None:
        word = "api_id" if "api_id" in node else "provider_id"
        number = node.get(word)
        slug = slugs.get(number) if isinstance(number, int | str) else None
        if slug is None:
            wrong(f"{place}.{word}", "No provider in this file has this id.")
    return {"provider": slug, **{name: node[name] for name in NODE if node.get(name) is not None}}


def _refuse_unknown(item: Mapping[str, Any], known: set[str], wrong: Callable[[str, str], None]) -> None:
    for name in [name for name in item if name not in known][:20]:
        wrong(str(name), "There is no such field.")
