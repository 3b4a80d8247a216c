"""What limits are counted for: a gateway key, its owner, a provider's key. A request may be counted for several at once."""

from __future__ import annotations

from typing import NamedTuple

from providers.wire import Credential, Quota

NOTHING = Quota()


class Scope(NamedTuple):
    """One that has limits. `name` identifies it among all, `text` is what refusals call it; None is no limit.

    numbers: the limits of requests, tokens and running ones as the script wants them, -1 for none.
    """

    name: str
    text: str
    requests: int | None
    tokens: int | None
    running: int | None
    numbers: tuple[int, int, int]


class Scopes(NamedTuple):
    """Those that a request is counted for, with the questions to Redis put together ahead of time.

    keys, numbers: of all of them in a row. windows: the keys where tokens are limited; places: where running ones are.
    """

    each: tuple[Scope, ...]
    keys: tuple[str, ...]
    numbers: tuple[int, ...]
    windows: tuple[str, ...]
    places: tuple[str, ...]


def scope(name: str, text: str, quota: Quota | None) -> Scope | None:
    """The scope of this name; None where nothing is limited."""
    if quota is None or quota == NOTHING:
        return None
    requests, tokens, running = (-1 if limit is None else limit for limit in quota)
    return Scope(name, text, *quota, (requests, tokens, running))


def scopes(*found: Scope | None) -> Scopes | None:
    """Those that there are, together; None where there is none."""
    each = tuple(one for one in found if one is not None)
    if not each:
        return None
    return Scopes(
        each,
        keys=tuple(redis_key(one.name, what) for one in each for what in "rtc"),
        numbers=tuple(number for one in each for number in one.numbers),
        windows=tuple(redis_key(one.name, "t") for one in each if one.tokens is not None),
        places=tuple(redis_key(one.name, "c") for one in each if one.running is not None),
    )


def of_credential(credential: Credential | None) -> Scopes | None:
    """What keeps us under a vendor's limits; None for most keys."""
    if credential is None or credential.quota is None:
        return None
    text = f"the provider's key {credential.name}"
    return scopes(scope(f"api_key:{credential.key_id}", text, credential.quota))


def redis_key(name: str, what: str) -> str:
    """`what`: r for requests, t for tokens, c for those that run."""
    return f"penstock:limit:{{{name}}}:{what}"
