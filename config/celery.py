"""Celery: beat ticks, workers do. What is due is a column in the database, so a lost or doubled message does no harm."""

from __future__ import annotations

import gc
import os
import sys
from typing import Any

from celery import Celery
from celery.signals import (
    beat_init,
    before_task_publish,
    setup_logging,
    task_postrun,
    task_prerun,
    worker_init,
    worker_process_init,
)
from django.apps import apps

from audit.request_ids import REQUEST_ID, request_id_from

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
if not apps.ready:
    gc.disable()  # until all is loaded (config/apps.py)

app = Celery("penstock")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@setup_logging.connect
def keep_our_logging(**kwargs: Any) -> None:
    """Celery would set up logging of its own; ours is in settings and redacts."""


REQUEST_ID_HEADER = "penstock_request_id"


@before_task_publish.connect
def hand_on_request_id(headers: dict[str, Any] | None = None, **kwargs: Any) -> None:
    """A task that a request starts belongs to that request."""
    if headers is not None and (request_id := REQUEST_ID.get()):
        headers[REQUEST_ID_HEADER] = request_id


@task_prerun.connect
def take_request_id(task_id: str, task: Any, **kwargs: Any) -> None:
    """Its log lines and audit entries have the id of the request, or the task's own. A message is not trusted to be ours (R56)."""
    given = task.request.get(REQUEST_ID_HEADER) or (task.request.headers or {}).get(REQUEST_ID_HEADER)
    REQUEST_ID.set(request_id_from(given if isinstance(given, str) else task_id))


@task_postrun.connect
def forget_request_id(**kwargs: Any) -> None:
    REQUEST_ID.set("")


@worker_init.connect
@beat_init.connect
@worker_process_init.connect
def keep_memory_to_itself(**kwargs: Any) -> None:
    """Probes open secrets, and the environment of each of these holds the encryption key (R09)."""
    from providers.hardening import harden_process

    harden_process()


@worker_init.connect
@beat_init.connect
def refuse_wrong_key(**kwargs: Any) -> None:
    """A wrong setting or encryption key, or tables of another version, end the process with one line, before anything is done."""
    from django.conf import settings
    from django.db import DatabaseError

    from config.env import refuse_wrong_settings
    from config.schema_version import newer_problem, older_problem
    from providers import keyring

    refuse_wrong_settings(list(settings.SETTINGS_PROBLEMS))
    if not settings.REDIS_URL:
        settings.DATA_DIR.joinpath("queue").mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        keyring.load()
        if problem := newer_problem() or older_problem():
            print(f"penstock: {problem}", file=sys.stderr)
            raise SystemExit(1)
    except keyring.WrongEncryptionKey as error:
        print(f"penstock: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except DatabaseError as error:
        # Whoever started us starts us again.
        said = " ".join(str(error).split()) or type(error).__name__
        print(f"penstock: the database cannot be read: {said}", file=sys.stderr)
        raise SystemExit(1) from None


@worker_process_init.connect
def open_keyring(**kwargs: Any) -> None:
    """Pool processes are forked or fresh; either way the keyring must be there."""
    from providers import keyring

    keyring.load()


@worker_init.connect
@beat_init.connect
def mend_queue(**kwargs: Any) -> None:
    """A worker that fell over what it found in the queue does not fall over it again."""
    from django.conf import settings

    from config import queue

    if settings.REDIS_URL:
        queue.mend(settings.REDIS_URL)
