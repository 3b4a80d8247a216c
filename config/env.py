"""Reading the environment: every setting once, with its type, its default and what to write instead.

A wrong value never raises here. It is kept as a `Problem`, the default stands in for it, and then `manage.py check` names it;
processes that serve or write refuse to start (`refuse_wrong_settings`). So one run tells all that is wrong.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import environ
from django.core.exceptions import ImproperlyConfigured

T = TypeVar("T")
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

ROLES = ("viewer", "operator", "administrator", "member")
"""As in audit.roles, which cannot be imported before there are settings."""
EXAMPLE_KEY = "base64url-of-32-random-bytes-goes-here"


@dataclass(frozen=True, slots=True)
class Problem:
    name: str
    hint: str

    def __str__(self) -> str:
        return f"{self.name}: {self.hint}"


class Reader:
    """Typed access to the environment; `NAME_FILE` may name a file that holds the value.

    names: every setting that was asked for, in order (docs/settings.md is tested against it).
    problems: what is wrong with the values given.
    """

    def __init__(self, env_file: Path) -> None:
        self._env = environ.FileAwareEnv()
        self._env.smart_cast = False
        if env_file.is_file():
            environ.Env.read_env(str(env_file))
        self.names: list[str] = []
        self.problems: list[Problem] = []

    def read(self, name: str, default: T, cast: Callable[[str], T], hint: str) -> T:
        """The value of `name` as `cast` makes it; a ValueError from `cast` becomes a problem with this hint."""
        self.names.append(name)
        try:
            text = str(self._env(name, default=""))
        except (ImproperlyConfigured, OSError):
            self.wrong(name, f"the file named by {name}_FILE cannot be read")
            return default
        if not text.strip():
            return default
        try:
            return cast(text.strip())
        except ValueError:
            self.wrong(name, hint)
            return default

    def wrong(self, name: str, hint: str) -> None:
        self.problems.append(Problem(name, hint))

    def text(self, name: str, default: str = "") -> str:
        return self.read(name, default, str, "write text")

    def flag(self, name: str, default: bool) -> bool:
        return self.read(name, default, _flag, "write true or false")

    def whole(self, name: str, default: int, *, least: int = 0, most: int = 2**31 - 1) -> int:
        return self.read(
            name, default, _between(int, least, most), f"write a whole number from {least} to {most}"
        )

    def seconds(self, name: str, default: float, *, least: float = 0.01, most: float = 86400) -> float:
        hint = f"write a number of seconds from {least:g} to {most:g}"
        return self.read(name, default, _between(float, least, most), hint)

    def choice(self, name: str, default: str, *choices: str) -> str:
        def cast(text: str) -> str:
            if text.lower() not in {choice.lower() for choice in choices}:
                raise ValueError
            return next(choice for choice in choices if choice.lower() == text.lower())

        return self.read(name, default, cast, "write one of: " + ", ".join(choices))

    def names_list(self, name: str, default: str = "") -> list[str]:
        return self.read(name, _words(default), _words, "write names separated by commas")

    def networks(self, name: str, default: str = "") -> tuple[Network, ...]:
        def cast(text: str) -> tuple[Network, ...]:
            return tuple(ipaddress.ip_network(word) for word in _words(text))

        return self.read(name, cast(default), cast, "write networks like 10.0.0.0/8, separated by commas")

    def origins(self, name: str) -> list[str]:
        return self.read(
            name, [], _origins, "write origins like https://app.example.com, separated by commas"
        )

    def key(self, name: str) -> bytes:
        """Base64url of at least 32 random bytes, decoded; empty when missing or wrong (which is a problem)."""
        hint = "write base64url of at least 32 random bytes (make run writes one into .env)"
        value = self.read(name, b"", key_from_text, hint)
        if not value and not any(problem.name == name for problem in self.problems):
            self.wrong(name, f"is missing; {hint}")
        return value

    def peppers(self, name: str) -> dict[int, bytes]:
        """`number:base64url` pairs separated by commas; the highest number is used for new keys."""
        hint = "write number:base64url of at least 32 random bytes, separated by commas"
        none: dict[int, bytes] = {}
        value = self.read(name, none, _peppers, hint)
        if not value and not any(problem.name == name for problem in self.problems):
            self.wrong(name, f"is missing; {hint}")
        return value

    def role_map(self, name: str) -> tuple[tuple[str, str], ...]:
        """`value=role` pairs separated by commas, as (value, group); `value=team:name` maps to a team."""
        hint = f"write VALUE=ROLE, separated by commas; ROLE is {', '.join(ROLES)}, or team:NAME for a group of yours"
        return self.read(name, (), _role_map, hint)

    def role_limits(self, name: str) -> dict[str, int]:
        """`role=number` pairs separated by commas."""
        none: dict[str, int] = {}
        return self.read(
            name, none, _role_limits, f"write ROLE=NUMBER, separated by commas; ROLE is {', '.join(ROLES)}"
        )

    def wrong_sign_on(self, issuer: str, *, client: str, secret: str, roles: object) -> None:
        """Name what is missing or wrong of single sign-on, once there is an issuer."""
        parts = urlsplit(issuer)
        loopback = parts.hostname in {"localhost", "127.0.0.1", "::1"}
        if not parts.hostname or parts.scheme not in ({"https", "http"} if loopback else {"https"}):
            self.wrong(
                "OIDC_ISSUER", "write the issuer's address, like https://login.example.com/realms/team"
            )
        if parts.query or parts.fragment or "/.well-known/" in issuer:
            self.wrong("OIDC_ISSUER", "write the issuer alone, without /.well-known/ and without a query")
        for name, value in (("OIDC_CLIENT_ID", client), ("OIDC_CLIENT_SECRET", secret)):
            if not value:
                self.wrong(name, "is missing; the identity provider tells it when the client is registered")
        if not roles and not any(problem.name == "OIDC_ROLE_MAP" for problem in self.problems):
            self.wrong("OIDC_ROLE_MAP", "is missing; without it nobody may sign in")


def key_from_text(text: str) -> bytes:
    """Decode base64url; ValueError when it is no base64url, below 32 bytes, or has almost no variety."""
    if text == EXAMPLE_KEY or not re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text):
        raise ValueError
    try:
        value = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except binascii.Error as error:
        raise ValueError from error
    if len(value) < 32 or len(set(value)) < 8:
        raise ValueError
    return value


def _flag(text: str) -> bool:
    if text.lower() in {"1", "true", "yes", "on"}:
        return True
    if text.lower() in {"0", "false", "no", "off"}:
        return False
    raise ValueError


def _between(number: Callable[[str], T], least: float, most: float) -> Callable[[str], T]:
    def cast(text: str) -> T:
        value = number(text)
        if not least <= value <= most:  # type: ignore[operator]  # T is int or float
            raise ValueError
        return value

    return cast


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _origins(text: str) -> list[str]:
    origins = [word.rstrip("/") for word in _words(text)]
    for origin in origins:
        parts = urlsplit(origin)
        if (
            parts.scheme not in {"http", "https"}
            or not parts.hostname
            or origin != f"{parts.scheme}://{parts.netloc}"
        ):
            raise ValueError
    return origins


def _peppers(text: str) -> dict[int, bytes]:
    peppers = {}
    for pair in _words(text):
        number, _, value = pair.partition(":")
        peppers[int(number)] = key_from_text(value)
    return peppers


def _role_map(text: str) -> tuple[tuple[str, str], ...]:
    pairs = []
    for word in _words(text):
        value, equals, role = (part.strip() for part in word.rpartition("="))
        team = role.removeprefix("team:").strip()
        if not equals or not value or not team or (role == team and role not in ROLES) or len(team) > 150:
            raise ValueError
        if role != team and team in ROLES:
            raise ValueError
        pairs.append((value, team))
    return tuple(pairs)


def _role_limits(text: str) -> dict[str, int]:
    limits = {}
    for word in _words(text):
        role, _, number = (part.strip() for part in word.partition("="))
        if role not in ROLES or role in limits or int(number) < 1:
            raise ValueError
        limits[role] = int(number)
    return limits


def refuse_wrong_settings(problems: list[Problem]) -> None:
    """End the process with one line for each wrong setting; used by what serves or writes."""
    if problems:
        for problem in problems:
            print(f"penstock: wrong setting {problem}", file=sys.stderr)
        raise SystemExit(1)
