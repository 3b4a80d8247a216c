"""The daily tidying of logins, and how Celery's processes start."""

from __future__ import annotations

import subprocess
from datetime import timedelta

import pytest
from axes.models import AccessAttempt
from django.contrib.auth.models import User
from django.test import Client
from django.utils import timezone
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken
from rest_framework_simplejwt.tokens import RefreshToken

from config.tasks import forget_logins
from providers.models import JobRun
from tests.support.gateway import PROGRAMS, Gateway
from tests.support.processes import REPOSITORY

pytestmark = pytest.mark.django_db


def expired(user: User, name: str) -> None:
    past = timezone.now() - timedelta(days=1)
    token = OutstandingToken.objects.create(user=user, jti=name, token=name, created_at=past, expires_at=past)
    BlacklistedToken.objects.create(token=token)


def test_expired_tokens_and_old_attempts_are_forgotten_and_others_are_kept(operator: User) -> None:
    expired(operator, "old")
    RefreshToken.for_user(operator)
    for name, age in (("new", timedelta()), ("old", timedelta(hours=25))):
        attempt = AccessAttempt.objects.create(username=name, failures_since_start=1)
        AccessAttempt.objects.filter(pk=attempt.pk).update(attempt_time=timezone.now() - age)
    forget_logins()
    assert OutstandingToken.objects.count() == 1
    assert not BlacklistedToken.objects.exists()
    assert [attempt.username for attempt in AccessAttempt.objects.all()] == ["new"]


def test_f30_it_runs_once_a_day_however_often_it_is_ticked(operator: User) -> None:
    forget_logins()
    expired(operator, "later")
    forget_logins()
    assert OutstandingToken.objects.filter(jti="later").exists()
    JobRun.objects.all().delete()
    forget_logins()
    assert not OutstandingToken.objects.exists()


def test_admin_without_a_slash_leads_to_the_admin(client: Client) -> None:
    answer = client.get("/admin")
    assert (answer.status_code, answer["Location"]) == (302, "/admin/")


@pytest.mark.no_database
@pytest.mark.parametrize("program", ["worker", "beat"])
def test_f22_a_celery_process_that_finds_no_database_ends_with_one_line(program: str) -> None:
    with Gateway(database="sqlite", start=False) as gateway:
        env = {**gateway.env, "DATABASE_URL": f"sqlite:///{gateway.folder / 'nothing' / 'here.sqlite3'}"}
        done = subprocess.run(
            PROGRAMS[program],
            cwd=REPOSITORY,
            env=env,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("penstock:")]
    assert len(said) == 1 and "the database cannot be read" in said[0]
    assert "Traceback" not in done.stderr
