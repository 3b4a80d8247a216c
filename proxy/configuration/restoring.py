"""A document into the database: all of it or nothing, as one recorded change.

What a restore would change is found out by restoring: a dry run does everything and takes it back, so that the difference it
shows is the one that the audit log would have.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from django.contrib.auth.base_user import AbstractBaseUser
from django.contrib.auth.models import AnonymousUser
from django.core.exceptions import ValidationError
from django.db import IntegrityError, models, transaction

from audit.api_errors import problem_of
from audit.changes import changes, record
from audit.models import Entry
from providers import transfer
from providers.models import Provider
from proxy.configuration import saving, values
from proxy.configuration.document import pepper_checks
from proxy.configuration.foreign import Problem, Source
from proxy.configuration.saving import Draft, LeftOut, Run
from proxy.configuration.sections import BY_NAME, SECTIONS, Section

HEADINGS = frozenset({"format", "made", "keyring", "peppers", "managed_by"})
"""What a document says beside its sections."""

MAX_PROBLEMS = 1000
WHOLE = ""


class Refused(Exception):
    """The document cannot be restored, so nothing was changed."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems[:3])))
        self.total = len(problems)
        self.problems = tuple(problems[:MAX_PROBLEMS])


class _TakeBack(Exception):
    """Ends a dry run."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a restore changed, or would change: the entries of the audit log, and what else is worth knowing."""

    changes: tuple[Entry, ...]
    notes: tuple[str, ...]


def restore(
    source: Source,
    *,
    actor: AbstractBaseUser | AnonymousUser | None,
    prune: bool = False,
    dry_run: bool = False,
    ip: str | None = None,
    request_id: str = "",
) -> Outcome:
    """Make the database what the document says; with `prune`, also delete what its sections do not name.

    Nothing may be open around it: it is one block of `changes()` on its own. Raises Refused, with everything that is wrong.
    """
    document = _checked(source)
    restoring = _Restoring(source, document, author=actor.get_username() if actor else "", prunes=prune)
    outcome: Outcome | None = None
    try:
        with changes(actor=actor, via="restore", ip=ip, request_id=request_id) as change:
            restoring.write()
            restoring.prune()
            restoring.finish()
            made = tuple(entry for entry in change.entries.values() if entry.changes)
            outcome = Outcome(made, (*source.notes, *restoring.run.notes))
            if dry_run:
                raise _TakeBack
    except _TakeBack:
        pass
    assert outcome is not None
    return outcome


def _checked(source: Source) -> Mapping[str, Any]:
    """The document, if it has the shape of one and is for this installation. Raises Refused."""
    problems = []
    for name, value in source.document.items():
        if name in HEADINGS:
            continue
        if name not in BY_NAME:
            problems.append(Problem(WHOLE, str(name)[:100], "There is no such section."))
        elif not isinstance(value, list):
            problems.append(Problem(WHOLE, name, "Write a list."))
    mark = source.document.get("managed_by")
    if mark is not None and not (isinstance(mark, str) and len(mark) <= 100):
        problems.append(Problem(WHOLE, "managed_by", "Write a name of at most 100 characters."))
    problems += _other_peppers(source.document.get("peppers"))
    if problems:
        raise Refused([*source.problems, *problems])
    return source.document


def _other_peppers(described: Any) -> Iterator[Problem]:
    """Gateway keys under a pepper that is another one here would not be accepted, although they look right."""
    ours = pepper_checks()
    for number, check in described.items() if isinstance(described, Mapping) else ():
        if number in ours and ours[number] != check:
            yield Problem(
                WHOLE, f"peppers.{number}", "PENSTOCK_PEPPERS has another pepper under this number."
            )


@dataclass(frozen=True, slots=True)
class _Nameless:
    """A row whose name an entry takes: until it gets another one, or is deleted, a word stands there that nobody chose.

    unique: the columns that no other row may have alike; the last is the name.
    """

    section: str
    number: int
    row: Any
    unique: tuple[str, ...]
    word: str

    @classmethod
    def made(cls, section: str, number: int, row: Any, unique: tuple[str, ...]) -> _Nameless:
        """Put the word there, and into the log that it was done: so what follows is told with the name from before."""
        column = unique[-1]
        name, most, random = getattr(row, column), row._meta.get_field(column).max_length, uuid.uuid4().hex
        word = f"{name[: most - len(random) - 1]}-{random}"
        type(row)._default_manager.filter(pk=row.pk).update(**{column: word})
        record(row, verb="update", before={column: name}, after={column: word})
        return cls(section, number, row, unique, word)

    def refuse_if_it_stays(self) -> None:
        model, column = type(self.row), self.unique[-1]
        if model._default_manager.filter(pk=self.row.pk, **{column: self.word}).exists():
            raise ValidationError({column: self.row.unique_error_message(model, self.unique)})


class _Restoring:
    """The steps of one restore; what goes wrong with an entry is kept, and the next one is looked at."""

    def __init__(self, source: Source, document: Mapping[str, Any], *, author: str, prunes: bool) -> None:
        self._source = source
        self._document = document
        self._prunes = prunes
        self._made_way: list[_Nameless] = []
        self.problems = list(source.problems)
        sealed = {
            transfer.data_key(entry["sealed"])
            for entry in document.get("api_keys", ())
            if isinstance(entry, Mapping) and isinstance(entry.get("sealed"), str) and entry["sealed"]
        }
        opener = transfer.Opener(document.get("keyring"), data_keys=sealed)
        self.run = Run(opener, author=author, managed_by=document.get("managed_by"))

    def write(self) -> None:
        for section in SECTIONS:
            if section.name in self._document:
                self.run.named[section.name] = set()
                self._write_section(section)

    def _write_section(self, section: Section) -> None:
        index = _Index(section)
        self._make_way(section, index)
        for number, entry in enumerate(self._document[section.name]):
            with self._blaming(section.name, number):
                if not isinstance(entry, Mapping):
                    raise ValidationError("Write an object.")
                self._write_entry(section, index, entry, self._source.place(section.name, number))

    def _make_way(self, section: Section, index: _Index) -> None:
        """Free the names that entries give to other rows than have them now, where those get another one or are deleted."""
        about: dict[int, Any] = {}
        for number, entry in enumerate(self._document[section.name]):
            # What is wrong with an entry is told when it is written.
            with suppress(ValidationError):
                about[number] = index.find(entry) if isinstance(entry, Mapping) else None
        named = {row.pk for row in about.values() if row is not None}
        for number, row in about.items():
            for names, holder in index.holders(self._document[section.name][number]) if row else ():
                if holder is not row and (holder.pk in named or self._is_pruned(section, holder)):
                    self._made_way.append(_Nameless.made(section.name, number, holder, names))

    def _write_entry(self, section: Section, index: _Index, entry: Mapping[str, Any], place: str) -> None:
        saving.refuse_unknown(entry, section.fields)
        if why := section.passed_over(entry):
            self.run.notes.append(f"{place}: {why}")
            return
        row = index.find(entry)
        named = self.run.named[section.name]
        if row is not None and row.pk in named:
            raise ValidationError("This stands there twice.")
        draft = self._draft(section, row, entry, place)
        try:
            section.save(draft)
        except LeftOut as error:
            self.run.notes.append(f"{place}: {draft.row} {error}")
            return
        named.add(draft.row.pk)
        index.add(draft.row)

    def _draft(self, section: Section, row: Any, entry: Mapping[str, Any], place: str) -> Draft:
        entry = dict(entry)
        if section.owned and "managed_by" not in entry and self.run.managed_by is not None:
            entry["managed_by"] = self.run.managed_by
        row = row if row is not None else section.model()
        before: dict[str, Any] = {}
        wrong: dict[str, list[str]] = {}
        for name in (*section.columns, *section.sealed):
            if name not in entry:
                continue
            try:
                value = values.accepted(section.model, name, entry[name])
            except ValidationError as error:
                wrong[name] = error.messages
                continue
            before[name] = getattr(row, name, None)
            setattr(row, name, value)
        if wrong:
            raise ValidationError(wrong)
        return Draft(row, entry, before, place, self.run)

    def prune(self) -> None:
        """Delete what the document's sections do not name, if asked to; with a mark, only what carries the same one."""
        if self.problems or not self._prunes:
            return
        for section in reversed(SECTIONS):
            if section.name not in self._document:
                continue
            for row in section.all_rows().exclude(pk__in=self.run.named[section.name]):
                if self._is_pruned(section, row):
                    with self._blaming(section.name, None):
                        row.delete()

    def _is_pruned(self, section: Section, row: Any) -> bool:
        """Whether a row that the document does not name is deleted."""
        ours = not self.run.managed_by or getattr(row, "managed_by", "") == self.run.managed_by
        return self._prunes and section.pruned and ours and not section.by_itself(row)

    def finish(self) -> None:
        """Look at the whole. Raises Refused with everything that was wrong."""
        for each in self._made_way if not self.problems else ():
            with self._blaming(each.section, each.number):
                each.refuse_if_it_stays()
        for provider in Provider.objects.filter(pk__in=self.run.moved).prefetch_related("keys"):
            if any(key.pk not in self.run.entered for key in provider.keys.all()):
                place = self.run.moved[provider.pk]
                self.problems.append(Problem(place, "base_url", saving.LEADS_ELSEWHERE))
        if self.problems:
            raise Refused(self.problems)

    @contextmanager
    def _blaming(self, section: str, number: int | None) -> Iterator[None]:
        """What goes wrong inside is the fault of this entry."""
        place = self._source.place(section, number) if number is not None else section
        try:
            with transaction.atomic():
                yield
        except ValidationError as error:
            found = error.error_dict if hasattr(error, "error_dict") else {WHOLE: error.error_list}
            for name, errors in found.items():
                word = WHOLE if name == "__all__" else self._source.word(section, name)
                self.problems += [Problem(place, word, message) for each in errors for message in _said(each)]
        except (models.ProtectedError, models.RestrictedError) as error:
            self.problems.append(Problem(place, WHOLE, problem_of(error).message))
        except IntegrityError:
            self.problems.append(Problem(place, WHOLE, "This conflicts with what is stored."))


def _said(error: ValidationError) -> list[str]:
    """What the model says, but for one message of Django's that repeats the value, which may be a key in the wrong column."""
    return ["This is none of the choices."] if error.code == "invalid_choice" else error.messages


class _Index:
    """The stored rows of a section, found by what identifies them."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._rows: dict[tuple[tuple[str, ...], tuple[str, ...]], Any] = {}
        for row in section.all_rows():
            self.add(row)

    def add(self, row: Any) -> None:
        for names in self._section.found_by:
            found = [values.read(row, name) for name in names]
            if None not in found:
                self._rows[names, tuple(map(str, found))] = row

    def holders(self, entry: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], Any]]:
        """The rows that have what identifies an entry, each with the columns that do."""
        for names in self._section.found_by:
            if all(entry.get(name) not in (None, "") for name in names):
                row = self._rows.get((names, tuple(str(entry[name]) for name in names)))
                if row is not None:
                    yield names, row

    def find(self, entry: Mapping[str, Any]) -> Any:
        """The row that an entry is about, or None. Raises ValidationError when the entry does not say."""
        for _, row in self.holders(entry):
            return row
        sets = self._section.found_by
        if self._section.one_of and any(all(entry.get(name) for name in names) for names in sets):
            return None
        missing = [name for name in self._section.found_by[-1] if entry.get(name) in (None, "")]
        if missing:
            raise ValidationError({name: ["This field is required."] for name in missing})
        return None
