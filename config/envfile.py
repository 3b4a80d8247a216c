"""Writes `.env` with fresh secrets; `python -m config.envfile PATH` needs nothing but the standard library.

A secret that is set already (in the environment, in the file, or as NAME_FILE) is left alone. A new encryption key is never
written beside a database that holds a keyring: what was sealed there would be lost to whoever starts with the new key.
"""

from __future__ import annotations

import base64
import os
import secrets
import sqlite3
import sys
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parent.parent
DATABASE_NAME = "penstock.sqlite3"
KEYRING_TABLE = "providers_keyring"
ANY_KEYRING = "SELECT 1 FROM providers_keyring LIMIT 1"

HEAD = """\
# Written by `make run`. Keep it private, and keep a copy of PENSTOCK_ENCRYPTION_KEY elsewhere: without it, stored provider keys
# cannot be opened. docs/settings.md lists everything that can be set here; the environment beats this file.
"""


class EnvFileError(Exception):
    """Why no `.env` is written; one line for a person."""


class KeyringExists(EnvFileError):
    """The database has a keyring, and the encryption key that opens it is not here."""


class DatabaseUnreadable(EnvFileError):
    """Nobody can say whether the database has a keyring, so no new key may be made."""


def random_text(size: int) -> str:
    """Base64url of `size` random bytes, without padding."""
    return base64.urlsafe_b64encode(secrets.token_bytes(size)).rstrip(b"=").decode()


SECRETS: Mapping[str, Callable[[], str]] = {
    "SECRET_KEY": lambda: random_text(48),
    "PENSTOCK_ENCRYPTION_KEY": lambda: random_text(32),
    "PENSTOCK_PEPPERS": lambda: "1:" + random_text(48),
    "JWT_SIGNING_KEY": lambda: random_text(48),
}


# Of use to compose.yaml only.
CONTAINER_SECRETS: Mapping[str, Callable[[], str]] = {"POSTGRES_PASSWORD": lambda: random_text(24)}


def write_missing_secrets(path: Path, makers: Mapping[str, Callable[[], str]] = SECRETS) -> list[str]:
    """Add a fresh value to `path` (mode 0600) for every secret that has none; the names that were written.

    When the encryption key is the missing one: raises KeyringExists if the database has a keyring and DatabaseUnreadable if it
    cannot be asked, in both cases before anything is written.
    """
    known = settings_in(path)
    missing = [name for name in makers if not known.get(name) and not known.get(f"{name}_FILE")]
    if "PENSTOCK_ENCRYPTION_KEY" in missing and has_keyring(known):
        raise KeyringExists(
            "the database already holds sealed keys, but PENSTOCK_ENCRYPTION_KEY is not set: "
            f"put the key it was made with into {path}, or set DATA_DIR or DATABASE_URL to an empty database"
        )
    if missing:
        _append(path, [f"{name}={makers[name]()}" for name in missing])
    return missing


def settings_in(path: Path) -> dict[str, str]:
    """What is set in `path` and in the environment, which wins; only what has a value."""
    return {**read(path), **{name: value for name, value in os.environ.items() if value}}


def read(path: Path) -> dict[str, str]:
    """The NAME=value lines of an env file that have a value; empty when there is no such file."""
    if not path.is_file():
        return {}
    pairs = (line.removeprefix("export ").partition("=") for line in path.read_text().splitlines())
    values = {name.strip(): value.strip().strip("'\"") for name, sign, value in pairs if sign}
    return {name: value for name, value in values.items() if value and not name.startswith("#")}


def data_dir(known: Mapping[str, str]) -> Path:
    return Path(known.get("DATA_DIR") or ROOT / "var").absolute()


def has_keyring(known: Mapping[str, str]) -> bool:
    """Whether the database that the settings in `known` name holds a keyring; a database that is not there has none."""
    url = known.get("DATABASE_URL") or f"sqlite:///{data_dir(known) / DATABASE_NAME}"
    if urlsplit(url).scheme.startswith("sqlite"):
        return _sqlite_has_keyring(Path(unquote(url.partition("://")[2].removeprefix("/"))))
    return _postgresql_has_keyring(url)


def _sqlite_has_keyring(path: Path) -> bool:
    if not path.is_file():
        return False
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            tables = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", (KEYRING_TABLE,))
            return tables.fetchone() is not None and connection.execute(ANY_KEYRING).fetchone() is not None
    except sqlite3.Error as error:
        raise DatabaseUnreadable(
            f"cannot read {path} to see whether it holds sealed keys: {error}"
        ) from error


def _postgresql_has_keyring(url: str) -> bool:
    # Only here is a package needed, so that containers can be prepared with a bare Python.
    import psycopg

    try:
        with psycopg.connect(url, connect_timeout=5) as connection:
            table = connection.execute("SELECT to_regclass(%s)", (KEYRING_TABLE,)).fetchone()
            if table is None or table[0] is None:
                return False
            return connection.execute(ANY_KEYRING).fetchone() is not None
    except psycopg.Error as error:
        # The driver's words may hold the whole address, password included.
        raise DatabaseUnreadable(
            "cannot ask the database of DATABASE_URL whether it holds sealed keys"
        ) from error


def _append(path: Path, lines: list[str]) -> None:
    """Add `lines`; the file is private from its first moment, and appears whole or not at all."""
    before = path.read_text() if path.is_file() else HEAD
    if not before.endswith("\n"):
        before += "\n"
    fresh = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(before + "\n".join(lines) + "\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.replace(path)


def main(arguments: list[str]) -> int:
    """`PATH` (default `.env`); with `--containers` also what compose.yaml needs."""
    makers = {**SECRETS, **CONTAINER_SECRETS} if "--containers" in arguments else SECRETS
    paths = [Path(word) for word in arguments if not word.startswith("-")]
    path = paths[0] if paths else ROOT / ".env"
    try:
        written = write_missing_secrets(path, makers)
    except EnvFileError as error:
        print(f"penstock: {error}", file=sys.stderr)
        return 1
    print(
        f"penstock: {path} has new secrets: {', '.join(written)}"
        if written
        else f"penstock: {path} is complete"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
