"""The page about backups: the state of the one on this machine, taking one out, and restoring one after a look at what changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from django import forms
from django.conf import settings
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import URLPattern, path, reverse
from django.views.decorators.http import require_POST

from audit.admin import guarded
from audit.api_errors import ip_of, request_id_of
from audit.models import Head
from audit.roles import may
from audit.strict_json import readable
from providers import transfer
from providers.keyring import WrongEncryptionKey
from proxy.api.backups import attachment
from proxy.configuration import differing, exporting, files, foreign, reading
from proxy.configuration.restoring import Outcome, Refused, restore

PENDING = "pending_restore"
PENDING_SECONDS = 900.0
"""How long a look at the difference counts as a look."""


class UploadForm(forms.Form):
    file = forms.FileField(required=False)
    prune = forms.BooleanField(required=False)


def page(request: HttpRequest, *, problems: tuple[foreign.Problem, ...] = (), said: str = "") -> HttpResponse:
    """What there is, and what can be done. problems, said: why a document was refused."""
    _require(request, "read")
    backup = Path(settings.BACKUP_FILE)
    head = files.head_of(backup)
    context = {
        "title": "Backup",
        "backup": backup,
        "version": head[0] if head else None,
        "current": head is not None and Head.objects.filter(seq=head[0], hash=head[1]).exists(),
        "former": files.former(),
        "keep": settings.BACKUP_KEEP,
        "refused": problems,
        "said": said,
    }
    return _shown(request, "admin/proxy/backup.html", context, status=400 if problems or said else 200)


@require_POST
def download(request: HttpRequest) -> HttpResponseBase:
    _require(request, "read")
    return guarded(
        request, lambda: attachment(exporting.taken_out(actor=request.user, via="admin", **_where(request)))
    )


@require_POST
def make(request: HttpRequest) -> HttpResponseBase:
    _require(request, "add")
    try:
        made = files.write()
    except files.NotWritten as error:
        messages.error(request, f"The backup was not made: {error}.")
    else:
        messages.success(request, f"The backup is up to date: version {made.version}, {made.bytes} bytes.")
    return HttpResponseRedirect(reverse("admin:backup"))


@require_POST
def preview(request: HttpRequest) -> HttpResponseBase:
    """Show what a restore would change. The document is set aside, sealed, until somebody says yes."""
    _require(request, "restore")
    form = UploadForm(request.POST, request.FILES)
    if not form.is_valid():
        return page(request, said="Choose a file that is not empty.")
    prune, uploaded = form.cleaned_data["prune"], form.cleaned_data["file"]
    try:
        body = uploaded.read() if uploaded else Path(settings.BACKUP_FILE).read_bytes()
    except OSError:
        return page(request, said="There is no backup on this machine that can be read. Choose a file.")

    def show() -> HttpResponseBase:
        outcome = _restored(request, body.decode("utf-8-sig"), prune=prune, dry_run=True)
        _set_aside(request, body.decode("utf-8-sig"), prune=prune)
        context = {
            "title": "What restoring would change",
            "changes": [(entry, _kind(entry.action), _rows(entry.changes)) for entry in outcome.changes],
            "outcome": outcome,
            "prune": prune,
            "name": uploaded.name if uploaded else Path(settings.BACKUP_FILE).name,
        }
        return _shown(request, "admin/proxy/backup_difference.html", context)

    return _told(request, show)


@require_POST
def confirm(request: HttpRequest) -> HttpResponseBase:
    """Restore what was looked at, if nothing has changed since."""
    _require(request, "restore")
    pending = request.session.pop(PENDING, None)
    if pending is None or time.time() - pending["at"] > PENDING_SECONDS:
        return page(request, said="That was too long ago. Choose the file again.")
    if Head.objects.values_list("seq", flat=True).get() != pending["version"]:
        return page(
            request, said="Somebody changed the configuration since you looked. Look at the difference again."
        )

    def do() -> HttpResponseBase:
        text = transfer.taken_up(pending["sealed"], purpose=_purpose(request))
        outcome = _restored(request, text, prune=pending["prune"], dry_run=False)
        messages.success(request, f"Restored: {differing.in_a_word(outcome, planned=False)}.")
        for note in outcome.notes[:20]:
            messages.warning(request, note)
        return HttpResponseRedirect(reverse("admin:backup"))

    return _told(request, do)


def _told(request: HttpRequest, view: Callable[[], HttpResponseBase]) -> HttpResponseBase:
    """Run a view; what is wrong with the document is told on the page."""
    try:
        return guarded(request, view)
    except Refused as error:
        return page(request, problems=error.problems, said=f"{error.total} problems, so nothing was changed.")
    except UnicodeDecodeError:
        return page(request, said="The file is not UTF-8.")
    except (reading.Unreadable, transfer.CannotOpen, WrongEncryptionKey) as error:
        return page(request, said=str(error))


def _restored(request: HttpRequest, text: str, *, prune: bool, dry_run: bool) -> Outcome:
    source = foreign.source_of(reading.read(text.encode()))
    return restore(source, actor=request.user, prune=prune, dry_run=dry_run, **_where(request))


def _set_aside(request: HttpRequest, text: str, *, prune: bool) -> None:
    request.session[PENDING] = {
        "sealed": transfer.set_aside(text, purpose=_purpose(request)),
        "prune": prune,
        "version": Head.objects.values_list("seq", flat=True).get(),
        "at": time.time(),
    }


def _purpose(request: HttpRequest) -> str:
    return f"restore|{request.user.pk}"


def _kind(action: str) -> tuple[str, str]:
    """A word and a colour for what happens to a thing."""
    return {"add": ("new", "good"), "delete": ("goes", "bad")}.get(
        action.partition("_")[0], ("changes", "warn")
    )


def _rows(changes: dict[str, list[Any]]) -> list[tuple[str, str, str]]:
    return [(name, _text(before), _text(after)) for name, (before, after) in changes.items()]


def _text(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    return value if isinstance(value, str) else readable(value)


def _where(request: HttpRequest) -> dict[str, Any]:
    return {"ip": ip_of(request), "request_id": request_id_of(request)}


def _require(request: HttpRequest, action: str) -> None:
    if not may(request.user, "backups", action):
        raise PermissionDenied


def _shown(request: HttpRequest, template: str, context: dict[str, Any], status: int = 200) -> HttpResponse:
    whole = {**admin.site.each_context(request), **context}
    return TemplateResponse(request, template, whole, status=status, headers={"Cache-Control": "no-store"})


_before: Callable[[], list[URLPattern]] = admin.site.extra_urls  # type: ignore[attr-defined]  # set by audit.admin.people


def _own_paths() -> list[URLPattern]:
    view = admin.site.admin_view
    return [
        path("backup/", view(page), name="backup"),
        path("backup/download/", view(download), name="backup-download"),
        path("backup/make/", view(make), name="backup-make"),
        path("backup/difference/", view(preview), name="backup-difference"),
        path("backup/restore/", view(confirm), name="backup-restore"),
        *_before(),
    ]


admin.site.extra_urls = _own_paths  # type: ignore[attr-defined]  # unfold adds it
