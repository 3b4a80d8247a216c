"""The daily tidying of logins."""

from __future__ import annotations

from datetime import timedelta

import pytest
from axes.models import AccessAttempt
from django.contrib.auth.models import User
from django.utils import timezone
from rest_framework_simplejwt.token_blacklist.models import BlacklistedToken, OutstandingToken
from rest_framework_simplejwt.tokens import RefreshToken

from config.tasks import forget_logins
from providers.models import JobRun

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
