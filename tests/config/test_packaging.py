"""What a newcomer, CI and a container build read: lock files, Makefile, Dockerfile, compose.yaml, supervisor.conf."""

from __future__ import annotations

import configparser
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.no_database

ROOT = Path(__file__).resolve().parent.parent.parent
LOCKS = (ROOT / "requirements.lock", ROOT / "tests" / "requirements.lock")
PROGRAMS = {"valkey", "drainer", "worker", "beat", "web"}
DRAIN_SECONDS = 35


def read_lock(path: Path) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Every requirement of a lock file with its hashes, by canonical name."""
    found: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for entry in path.read_text().replace("\\\n", " ").splitlines():
        words, *hashes = entry.split("--hash=")
        requirement = Requirement(words.strip())
        found.setdefault(canonicalize_name(requirement.name), []).append(
            (requirement, [text.strip() for text in hashes])
        )
    return found


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_r57_everything_locked_is_exact_and_carries_hashes(path: Path) -> None:
    for entries in read_lock(path).values():
        for requirement, hashes in entries:
            assert re.fullmatch(r"==[^*,]+", str(requirement.specifier)), f"{requirement} is not exact"
            assert hashes, f"{requirement} has no hash"
            assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", text) for text in hashes)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: str(path.relative_to(ROOT)))
def test_r57_no_lock_names_an_index_or_any_other_address(path: Path) -> None:
    assert not re.search(r"://|--index-url|--extra-index-url|--find-links| @ ", path.read_text())


def test_the_lock_fits_the_ranges_of_the_project() -> None:
    locked = read_lock(LOCKS[0])
    for text in project()["project"]["dependencies"]:
        wanted = Requirement(text)
        for requirement, _ in locked[canonicalize_name(wanted.name)]:
            assert wanted.specifier.contains(str(requirement.specifier).removeprefix("=="))


def test_tests_run_on_the_versions_that_are_shipped() -> None:
    shipped, tested = (read_lock(path) for path in LOCKS)
    for name, entries in shipped.items():
        assert {str(entry) for entry, _ in entries} == {str(entry) for entry, _ in tested[name]}
    for text in project()["dependency-groups"]["dev"]:
        assert canonicalize_name(Requirement(text).name) in tested


def test_r57_installing_fails_when_one_hash_is_edited(tmp_path: Path) -> None:
    """A package that is at hand is installed from a folder, so that the test needs no network."""
    wheel = tmp_path / "harmless-1.0-py3-none-any.whl"
    build_wheel(wheel)
    lock = tmp_path / "lock"
    lock.write_text(f"harmless==1.0 --hash=sha256:{'0' * 64}\n")
    options = makefile_variable("PIP_INSTALL").partition(" install ")[2].split()
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pip", "--isolated", "install", *options, "--no-index"),
            *("--find-links", tmp_path, "--target", tmp_path / "into", "--requirement", lock),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "DO NOT MATCH THE HASHES" in done.stderr
    assert not (tmp_path / "into").exists()


def build_wheel(path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("harmless.py", "")
        archive.writestr(
            "harmless-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: harmless\nVersion: 1.0\n"
        )
        archive.writestr(
            "harmless-1.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("harmless-1.0.dist-info/RECORD", "")


def makefile_variable(name: str) -> str:
    match = re.search(rf"^{name} :?= (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert match is not None
    return match[1]


def test_make_alone_prints_every_command_of_the_contract() -> None:
    done = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    )
    printed = set(re.findall(r"^  make (\S+) +\S", done.stdout, re.MULTILINE))
    assert printed >= {
        "run", "dev", "install", "build", "test", "soak", "check", "lint", "format", "bench", "lock", "help",
        "docker-build", "docker-up", "docker-down", "docker-logs",
    }  # fmt: skip


def test_every_command_that_make_prints_has_a_rule() -> None:
    text = (ROOT / "Makefile").read_text()
    phony = set(re.findall(r"^\.PHONY: (\S+)$", text, re.MULTILINE))
    assert phony == set(re.findall(r"^([a-z-]+):.*## ", text, re.MULTILINE))


def test_ci_runs_what_a_contributor_runs() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert [line for line in lines if line.startswith("make ")] == ["make check", "make test"]


def dockerfile() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile, with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split()[0], line.partition(" ")[2]) for line in lines]


def test_the_image_is_slim_unprivileged_and_says_how_it_feels() -> None:
    steps = dockerfile()
    names = [name for name, _ in steps]
    assert [words.split()[0] for name, words in steps if name == "FROM"] == ["python:3.13-slim"] * 2
    last_stage = steps[len(names) - 1 - names[::-1].index("FROM") :]
    users = [words for name, words in last_stage if name == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1]), "the last user must be a number other than root"
    assert any("/livez" in words for name, words in last_stage if name == "HEALTHCHECK")
    assert last_stage[-1] == ("CMD", '["python", "manage.py", "serve"]')


def test_r57_the_image_installs_by_hash() -> None:
    installs = [
        words for name, words in dockerfile() if name == "RUN" and " install " in words and "pip" in words
    ]
    assert len(installs) == 1
    assert "--require-hashes --only-binary :all:" in installs[0]


def test_no_secret_is_baked_into_the_image() -> None:
    assert not any(re.search(r"SECRET|KEY|PEPPER|PASSWORD", words) for _, words in dockerfile())
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert "!openapi.yaml" in ignored  # it is what /api/schema answers
    assert not {"!.env", "!var", "!.git"} & set(ignored)


def compose() -> dict[str, Any]:
    loaded = yaml.safe_load((ROOT / "compose.yaml").read_text())
    assert isinstance(loaded, dict)
    return loaded


def test_the_containers_are_the_processes_and_their_stores() -> None:
    services = compose()["services"]
    assert set(services) == {"migrate", "web", "worker", "beat", "drainer", "postgres", "valkey"}
    assert services["migrate"]["restart"] == "no"
    for name in set(services) - {"migrate"}:
        assert services[name]["restart"] == "unless-stopped"
    for name in ("web", "worker", "beat", "drainer"):
        conditions = {key: value["condition"] for key, value in services[name]["depends_on"].items()}
        assert conditions == {
            "migrate": "service_completed_successfully",
            "postgres": "service_healthy",
            "valkey": "service_healthy",
        }
    for name in ("postgres", "valkey"):
        assert services[name]["healthcheck"]["test"]


def test_web_and_drainer_share_the_spool() -> None:
    services = compose()["services"]
    for name in ("web", "drainer"):
        assert services[name]["volumes"] == ["data:/data"]
        assert services[name]["environment"]["DATA_DIR"] == "/data"


def test_web_has_time_to_drain_in_a_container() -> None:
    assert int(compose()["services"]["web"]["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS


def test_the_containers_are_reached_from_this_machine_only_and_hold_no_secret() -> None:
    for service in compose()["services"].values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, value in service.get("environment", {}).items():
            if re.search(r"SECRET|KEY|PEPPER|PASSWORD", name):
                assert str(value).startswith("${"), f"{name} has a known value"


def supervisor() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read(ROOT / "config" / "supervisor.conf")
    return parser


def test_supervisor_repairs_every_process_and_stops_web_first() -> None:
    parser = supervisor()
    programs = {
        name.partition(":")[2]: parser[name] for name in parser.sections() if name.startswith("program:")
    }
    assert set(programs) == PROGRAMS
    assert all(program["autorestart"] == "true" for program in programs.values())
    by_priority = sorted(programs, key=lambda name: int(programs[name]["priority"]))
    assert by_priority == ["valkey", "drainer", "worker", "beat", "web"]
    assert int(programs["web"]["stopwaitsecs"]) > DRAIN_SECONDS


def test_supervisor_listens_on_no_port_and_shows_no_secret() -> None:
    parser = supervisor()
    assert "inet_http_server" not in parser
    for name in parser.sections():
        assert "environment" not in parser[name]
        assert not re.search(r"SECRET|PEPPER|PASSWORD|_KEY", parser[name].get("command", ""))


def test_every_name_in_the_example_is_documented_and_no_secret_has_a_value() -> None:
    settings_page = (ROOT / "docs" / "settings.md").read_text()
    for line in (ROOT / ".env.example").read_text().splitlines():
        if match := re.fullmatch(r"#?([A-Z_]+)=(.*)", line):
            assert f"`{match[1]}`" in settings_page
            if re.search(r"SECRET|KEY|PEPPER|PASSWORD", match[1]):
                assert match[2] == ""


def test_git_keeps_secrets_and_data_out() -> None:
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert {"/.env", "/var/", "/.venv*/"} <= set(ignored)


def test_checks_do_not_ask_the_database_of_this_checkout(tmp_path: Path) -> None:
    """`make build` and `make check` work beside a gateway whose database holds a keyring."""
    import sqlite3

    database = tmp_path / "penstock.sqlite3"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE providers_keyring (id)")
        connection.execute("INSERT INTO providers_keyring VALUES (1)")
    connection.close()
    check = tmp_path / "check"
    subprocess.run(
        [
            "make",
            "-C",
            str(ROOT),
            f"CHECK_DIR={check}",
            f"BIN={Path(sys.executable).parent}",
            str(check / "env"),
        ],
        env={"PATH": os.environ["PATH"], "DATA_DIR": str(tmp_path)},
        capture_output=True,
        check=True,
    )
    assert "PENSTOCK_ENCRYPTION_KEY=" in (check / "env").read_text()
