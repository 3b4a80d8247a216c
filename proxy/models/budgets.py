"""How much somebody may spend, and what of that is spent and held."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any, ClassVar

from django.conf import settings
from django.contrib.auth.models import Group
from django.core.exceptions import ValidationError
from django.core.validators import MaxValueValidator, MinValueValidator
from django.db import models
from django.db.models import CheckConstraint, F, Prefetch, Q, UniqueConstraint
from django.utils import timezone

from audit.changes import Identity
from audit.roles import Role
from providers.models import Provider
from providers.models.provider import Versioned
from proxy.models.keys import GatewayKey
from proxy.purses import NEVER, WINDOWS, window_at

NANO = 1_000_000_000
MOST_USD = 1_000_000_000
MOST = MOST_USD * NANO
SUBJECTS = ("gateway_key", "user", "team", "provider")
SUBJECT: dict[str, Any] = {
    "on_delete": models.CASCADE,
    "null": True,
    "blank": True,
    "related_name": "budget",
}


class Window(models.TextChoices):
    TOTAL = "total", "Total: never begins anew"
    DAY = "day", "Day"
    WEEK = "week", "Week, from Monday"
    MONTH = "month", "Month"


def _one_subject() -> Q:
    condition = Q()
    for name in SUBJECTS:
        condition |= Q(**{f"{other}__isnull": other != name for other in SUBJECTS})
    return condition


class Budget(Versioned):
    """What a gateway key, the keys of a user or of a team, or a provider may spend in a window of time (UTC).

    amount: nano-dollars. hard: whether requests are refused that could exceed it; a soft one only warns. What was spent is
    kept on accounts, so that saving a budget never changes it.
    """

    gateway_key = models.OneToOneField(GatewayKey, **SUBJECT)
    user = models.OneToOneField(settings.AUTH_USER_MODEL, **SUBJECT)
    team = models.OneToOneField(Group, **SUBJECT)
    provider = models.OneToOneField(Provider, **SUBJECT)
    amount = models.BigIntegerField(
        validators=[MinValueValidator(0), MaxValueValidator(MOST)], help_text="Nano-dollars."
    )
    window = models.CharField(max_length=8, choices=Window, default=Window.MONTH)
    hard = models.BooleanField(
        default=True, help_text="Refuse requests that could exceed it. Otherwise it only warns."
    )
    warn_at_percent = models.PositiveSmallIntegerField(
        default=80,
        validators=[MinValueValidator(1), MaxValueValidator(100)],
        help_text="From this part of the amount on it warns.",
    )

    class Meta:
        ordering: ClassVar = ["id"]
        constraints: ClassVar = [
            CheckConstraint(condition=_one_subject(), name="budget_is_of_exactly_one"),
            CheckConstraint(condition=Q(amount__gte=0, amount__lte=MOST), name="budget_amount_is_in_range"),
            CheckConstraint(condition=Q(window__in=WINDOWS), name="budget_window_is_known"),
            CheckConstraint(
                condition=Q(warn_at_percent__gte=1, warn_at_percent__lte=100),
                name="budget_warns_at_a_percentage",
            ),
        ]

    def __str__(self) -> str:
        return f"budget of {self.subject_name}"

    def save(self, *args: Any, **kwargs: Any) -> None:
        super().save(*args, **kwargs)
        self._touch_key()

    def delete(self, *args: Any, **kwargs: Any) -> tuple[int, dict[str, int]]:
        self._touch_key()
        return super().delete(*args, **kwargs)

    def _touch_key(self) -> None:
        """The budget is a part of what is shown of a key, and so of its version."""
        if self.gateway_key_id is not None:
            GatewayKey.objects.filter(pk=self.gateway_key_id).update(version=F("version") + 1)

    @property
    def subject_kind(self) -> str:
        """Which of SUBJECTS it is of."""
        return next((name for name in SUBJECTS if getattr(self, f"{name}_id") is not None), "")

    @property
    def subject_name(self) -> str:
        kind = self.subject_kind
        return f"{kind.replace('_', ' ')} {getattr(self, kind)}" if kind else "nobody"

    @property
    def account(self) -> BudgetAccount:
        """The account of the window that lies around now; an empty one, not stored, where nothing was asked of it yet.

        Lists fetch them at once with `current_accounts`.
        """
        found: list[BudgetAccount] | None = getattr(self, "current", None)
        if found is None:
            found = list(self.accounts.filter(_around_now(), window=self.window))
        if found:
            return found[0]
        start, _ = window_at(self.window, timezone.now().timestamp())
        return BudgetAccount(budget=self, window=self.window, window_start=start_of(start))

    @property
    def begins_anew(self) -> datetime | None:
        """When the present window ends; None: never."""
        _, ends = window_at(self.window, timezone.now().timestamp())
        return None if ends == NEVER else datetime.fromtimestamp(ends, UTC)

    def clean(self) -> None:
        if sum(getattr(self, f"{name}_id") is not None for name in SUBJECTS) != 1:
            raise ValidationError("A budget is of exactly one: a gateway key, a user, a team or a provider.")
        if getattr(self.team, "name", "") in set(Role):
            raise ValidationError({"team": "This group is a role, not a team."})

    def audit_identity(self) -> Identity:
        return Identity("budget", str(self.pk), self.subject_name[:255], "budget")


class BudgetAccount(models.Model):
    """What was spent and is held of a budget in one window; written by workers and the drainer, never by people.

    spent: the sum of the costs of the usage records that were charged to it. held: what workers were granted and have not
    spent: the sum of `granted - settled` over its grants (see `proxy.budget_accounts`). Both nano-dollars.
    """

    budget = models.ForeignKey(Budget, on_delete=models.CASCADE, related_name="accounts")
    window = models.CharField(max_length=8, choices=Window)
    window_start = models.DateTimeField()
    spent = models.BigIntegerField(default=0)
    held = models.BigIntegerField(default=0)
    warned_at = models.DateTimeField(null=True, blank=True, help_text="When it last reached its percentage.")

    class Meta:
        verbose_name = "budget account"
        ordering: ClassVar = ["budget", "-window_start"]
        constraints: ClassVar = [
            UniqueConstraint(
                fields=["budget", "window", "window_start"], name="budget_account_is_one_per_window"
            ),
            CheckConstraint(condition=Q(spent__gte=0), name="budget_spent_is_not_negative"),
            CheckConstraint(condition=Q(held__gte=0), name="budget_held_is_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.budget}, {self.window} from {self.window_start:%Y-%m-%d}"


class BudgetGrant(models.Model):
    """What one worker was granted of an account. Removed, and the rest returned, when its worker is dead and its spool drained.

    worker: the uid that its spool segments are named after. granted: written by the worker alone. settled: what its records
    have spent of it so far, written by the drainer. touched_at: the last change by either.
    """

    worker = models.CharField(max_length=32)
    account = models.ForeignKey(BudgetAccount, on_delete=models.CASCADE, related_name="grants")
    granted = models.BigIntegerField(default=0)
    settled = models.BigIntegerField(default=0)
    touched_at = models.DateTimeField(db_index=True)

    class Meta:
        verbose_name = "budget grant"
        ordering: ClassVar = ["id"]
        constraints: ClassVar = [
            UniqueConstraint(fields=["worker", "account"], name="budget_grant_is_one_per_worker"),
            CheckConstraint(
                condition=Q(settled__gte=0, granted__gte=F("settled")), name="budget_grant_is_not_overdrawn"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.account}: {self.granted - self.settled}"


def start_of(start: int) -> datetime:
    return datetime.fromtimestamp(start, UTC)


def current_accounts(path: str = "accounts") -> Prefetch[Any]:
    """Fetches the account of the window that lies around now, as the list `current` of each budget."""
    rows = BudgetAccount.objects.filter(_around_now(), window=F("budget__window"))
    return Prefetch(path, queryset=rows, to_attr="current")


def _around_now() -> Q:
    now = timezone.now().timestamp()
    condition = Q(pk=None)
    for window in WINDOWS:
        condition |= Q(window=window, window_start=start_of(window_at(window, now)[0]))
    return condition


def warned() -> models.QuerySet[BudgetAccount]:
    """Accounts of present windows that have reached the percentage at which their budget warns."""
    return BudgetAccount.objects.filter(
        _around_now(),
        window=F("budget__window"),
        spent__gt=0,
        # Divided first, so that no amount leaves 64 bits; a hundredth of a nano-dollar is nobody's.
        spent__gte=F("budget__amount") / 100 * F("budget__warn_at_percent"),
    )


def set_key_budget(key: GatewayKey, amount: int | None, window: str | None) -> None:
    """Make this the amount (nano-dollars) of a key's budget, and its window where one is named; None takes it away.

    Inside `audit.changes`. Raises ValidationError.
    """
    row = Budget.objects.filter(gateway_key=key).first()
    if amount is None:
        if row is not None:
            row.delete()
        return
    row = row or Budget(gateway_key=key)
    window = window or row.window
    if row.pk and (row.amount, row.window) == (amount, window):
        return
    row.amount, row.window = amount, window
    row.full_clean()
    row.save()
