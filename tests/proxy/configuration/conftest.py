from __future__ import annotations

import pytest
from django.contrib.auth.models import User

from providers import keyring
from tests.support.configuration import fill


@pytest.fixture
def ring(db: None) -> None:
    """The keyring of the test database, in use; other tests may have put another one in its place."""
    keyring.load()


@pytest.fixture
def filled(ring: None, owner: User) -> str:
    """An installation with one of everything; the whole gateway key."""
    return fill(owner)
