"""Who a gateway key belongs to: a user, a team, or nobody. Records and the API write `alice` or `team:ml`.

A team is a group that is no role. A user name that the forms allow has no colon, so the two are never confused.
"""

from __future__ import annotations

from typing import Any

from django.contrib.auth.models import Group, User
from django.db.models import Q, QuerySet

from audit.roles import Role
from proxy.auth import TEAM

Owner = User | Group


def not_a_role() -> Q:
    """What picks the teams among the groups."""
    return ~Q(name__in=list(Role))


def teams() -> QuerySet[Group]:
    return Group.objects.filter(not_a_role())


def text_of(owner: Any) -> str:
    """`alice`, `team:ml`, or nothing."""
    if owner is None:
        return ""
    return f"{TEAM}{owner.name}" if isinstance(owner, Group) else str(owner.get_username())


def find(text: str) -> Owner | None:
    """The active user or the team that is written so."""
    if text.startswith(TEAM):
        return teams().filter(name=text.removeprefix(TEAM)).first()
    return User.objects.filter(is_active=True, username=text).first()


def owned_by(user: Any) -> Q:
    """What picks, among rows with an owner, those of this user and of his teams."""
    return Q(owner=user) | Q(team__in=teams().filter(user=user))


class Owned:
    """A row with the columns `owner` (a user) and `team`, of which one is set at the most."""

    owner: Any
    team: Any

    @property
    def holder(self) -> Owner | None:
        """The user or the team."""
        found: Owner | None = self.team or self.owner
        return found

    @holder.setter
    def holder(self, found: Owner | None) -> None:
        self.team = found if isinstance(found, Group) else None
        self.owner = None if isinstance(found, Group) else found
