"""Celery: beat ticks, workers do. What is due is a column in the database, so a lost or doubled message does no harm."""

from __future__ import annotations

import os
import sys
from typing import Any

from celery import Celery
from celery.signals import beat_init, setup_logging, worker_init, worker_process_init

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")

app = Celery("penstock")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()


@setup_logging.connect
def keep_our_logging(**kwargs: Any) -> None:
    """Celery would set up logging of its own; ours is in settings and redacts."""


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
