"""What is wrong with what is stored: for `doctor`, which a person runs when something does not open."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from django.conf import settings

from audit.verify import head_problem, missing_triggers
from providers import keyring, rotation


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong. model, pk and field say where, when it is a stored value."""

    what: str
    problem: str
    model: str = ""
    pk: int | str | None = None
    field: str = ""

    def __str__(self) -> str:
        place = f"{self.model} {self.pk} {self.field} ({self.what})" if self.model else self.what
        return f"{place}: {self.problem}"


_more: list[Callable[[], Iterable[Finding]]] = []


def know(check: Callable[[], Iterable[Finding]]) -> None:
    """Tell of a check of an application above this one."""
    _more.append(check)


def diagnose() -> list[Finding]:
    """Everything that is wrong, nothing when all is well. Raises DatabaseError when the database cannot be read."""
    findings = [Finding(f"setting {problem.name}", problem.hint) for problem in settings.SETTINGS_PROBLEMS]
    findings += _sealed_values()
    findings += [
        Finding("audit log", f"the trigger {name} is missing; run manage.py migrate")
        for name in missing_triggers()
    ]
    if problem := head_problem():
        findings.append(Finding("audit log", f"{problem}; run manage.py verify_audit"))
    for check in _more:
        findings += check()
    return findings


def _sealed_values() -> list[Finding]:
    try:
        keyring.load()
    except keyring.WrongEncryptionKey as error:
        # Without the keyring nothing opens, which one line says better than ten thousand.
        return [Finding("keyring", str(error))]
    return [
        Finding(value.key, value.problem, value.model, value.pk, value.field)
        for value in rotation.values_that_do_not_open()
    ]
