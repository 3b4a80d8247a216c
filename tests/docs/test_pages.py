"""What people can type, call and choose is written down: a command, kind, path or metric without a word about it fails."""

from __future__ import annotations

import re
from importlib import import_module
from operator import attrgetter
from pathlib import Path

import pytest
from django.core.management import get_commands
from django.urls import URLPattern
from prometheus_client import REGISTRY

import proxy.metrics  # noqa: F401 -- registers the metrics
from config import api_v1
from config.greeting import KEY_HINT
from providers.adapters import KINDS, SELF_HOSTED, VENDORS
from tests.support.api import template

ROOT = Path(__file__).resolve().parents[2]
APPS = {"audit", "config", "providers", "proxy"}


def page(name: str) -> str:
    return (ROOT / name).read_text()


def our_commands() -> set[str]:
    return {name for name, app in get_commands().items() if app in APPS}


def test_every_command_is_documented() -> None:
    commands = page("docs/operations.md").partition("## Commands")[2].partition("\n## ")[0]
    assert {name for name in our_commands() if f"`{name}" not in commands} == set()


def test_the_commands_that_pages_tell_people_to_run_exist() -> None:
    texts = [KEY_HINT, page("README.md"), *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    told = {name for text in texts for name in re.findall(r"manage\.py ([a-z_]+)", text)}
    assert told - set(get_commands()) == set()


def test_every_target_that_pages_name_is_in_the_makefile() -> None:
    targets = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    texts = [page("README.md"), *(path.read_text() for path in (ROOT / "docs").glob("*.md"))]
    told = {name for text in texts for name in re.findall(r"[`$] ?make ([a-z-]+)", text)}
    assert told - targets == set()


def test_every_kind_is_in_the_table_of_adapters() -> None:
    table = page("docs/adapters.md").partition("## Adding one")[0]
    rows = {
        name
        for row in re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
        for name in re.findall(r"`(.+?)`", row)
    }
    assert rows == set(KINDS)


def test_the_guide_says_how_to_add_each_kind_with_its_usual_address() -> None:
    guide = page("docs/guide.md")
    assert {name for name in SELF_HOSTED | VENDORS if f"| `{name}`" not in guide} == set()
    for name in ("ollama", "llamacpp", "vllm"):
        assert f"| `{name}` | `{KINDS[name].base_url}` |" in guide


def control_plane() -> set[str]:
    """The paths of the router as the page writes them: /api/v1/servers/{id}."""
    found: set[str] = set()
    for pattern in api_v1.urlpatterns:
        assert isinstance(pattern, URLPattern)
        found.add("/api/v1" + template(str(pattern.pattern)).replace("audit/{id}", "audit/{seq}"))
    return found


def test_every_path_of_the_control_plane_is_documented_and_no_other() -> None:
    rows = re.findall(r"^\| `(?:POST )?(/api/v1/[^`]+)` \|", page("docs/api.md"), re.MULTILINE)
    assert set(rows) == control_plane()


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/v1/models",
        "/ws/chat",
        "/livez",
        "/readyz",
        "/metrics",
        "/api/schema/",
        "/api/docs/",
        "/ping",
    ],
)
def test_every_other_public_path_is_documented(path: str) -> None:
    assert f"{path}" in "".join(page(f"docs/{name}.md") for name in ("api", "guide", "operations"))


def test_every_metric_of_ours_is_documented_and_no_other() -> None:
    ours = set()
    for family in REGISTRY.collect():
        if family.name.startswith(("penstock_", "credential_")):
            ours.add(family.name + ("_total" if family.type == "counter" else ""))
    documented = set(
        re.findall(r"^\| `((?:penstock|credential)_\w+)` \|", page("docs/operations.md"), re.MULTILINE)
    )
    assert documented == ours


def test_the_numbers_of_failing_providers_are_those_of_the_code() -> None:
    part = page("docs/operations.md").partition("## Providers that fail")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| .+ \| (.+) \| `(\w+)\.([\w.]+)` \|$", part, re.MULTILINE)
    assert len(rows) == len(re.findall(r"^\| ", part, re.MULTILINE)) - 2
    for told, module, name in rows:
        value = attrgetter(name)(import_module(f"proxy.{module}"))
        values = value if isinstance(value, tuple) else (value,)
        assert [float(number) for number in re.findall(r"[\d.]+", told)] == [*values], name


def test_the_table_of_what_carries_a_request_names_files_that_exist() -> None:
    part = page("docs/architecture.md").partition("What carries a request")[2].partition("\n## ")[0]
    names = {name for row in re.findall(r"^\| (`.+?) \|", part, re.MULTILINE) for name in row.split(", ")}
    assert {name for name in names if not (ROOT / "proxy" / name.strip("`")).is_file()} == set()
    assert len(names) > 5
