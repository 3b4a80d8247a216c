"""Budgets, and what of them is spent and held; a gateway key's `budget_usd` is a view of the same row."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, ClassVar

from django.contrib.auth import get_user_model
from django.contrib.auth.models import Group
from django.db.models import Manager, Q, QuerySet
from drf_spectacular.utils import extend_schema_field
from rest_framework import serializers
from rest_framework.fields import empty

from audit import roles
from audit.api_views import Rows, StrictSerializer, word_of
from providers.models import Provider
from proxy.models import Budget, GatewayKey, Window
from proxy.models.budgets import MOST_USD, SUBJECTS, current_accounts, set_key_budget
from proxy.models.keys import keys_of
from proxy.pricing import nano_of

MOVED = "A budget stays with whom it is of, and so does what was spent of it; make another one."


@extend_schema_field({"type": "number", "minimum": 0, "maximum": MOST_USD})
class UsdField(serializers.DecimalField):
    """US dollars, as a number or as text; in the database a whole number of nano-dollars."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(
            max_digits=19, decimal_places=9, min_value=Decimal(0), max_value=Decimal(MOST_USD), **kwargs
        )

    def to_representation(self, value: Any) -> Any:
        return value / 1_000_000_000

    def run_validation(self, data: Any = empty) -> Any:
        dollars = super().run_validation(data)
        return nano_of(dollars) if isinstance(dollars, Decimal) else dollars


class SubjectField(serializers.Field[Any, Any, Any, Any]):
    """Whom a budget is of: a name, for which the id is accepted too."""

    def __init__(self, rows: Manager[Any], name: str, **kwargs: Any) -> None:
        self._rows, self._name = rows, name
        super().__init__(required=False, allow_null=True, **kwargs)

    def to_representation(self, value: Any) -> Any:
        return getattr(value, self._name)

    def to_internal_value(self, data: Any) -> Any:
        text = str(data) if isinstance(data, int | str) and not isinstance(data, bool) else ""
        condition = Q(**{self._name: text}) if self._name != "pk" else Q(pk=None)
        if text.isascii() and text.isdigit() and len(text) <= 18:
            condition = Q(pk=int(text))
        found = self._rows.filter(condition).first() if text and "\0" not in text else None
        if found is None:
            raise serializers.ValidationError("There is none of this name or id.")
        return found


@extend_schema_field({"type": ["integer", "null"], "description": "The id of a gateway key."})
class KeyField(SubjectField):
    pass


@extend_schema_field({"type": ["string", "null"], "description": "A name; the id is accepted too."})
class NameField(SubjectField):
    pass


class BudgetSerializer(StrictSerializer[Budget]):
    volatile: ClassVar = frozenset(
        {"spent_usd", "held_usd", "remaining_usd", "window_start", "resets_at", "warned_at", "updated_at"}
    )

    gateway_key = KeyField(GatewayKey.objects, "pk")
    user = NameField(get_user_model()._default_manager, "username")
    team = NameField(Group.objects, "name")
    provider = NameField(Provider.objects, "slug")
    amount_usd = UsdField(source="amount")
    spent_usd = UsdField(source="account.spent", read_only=True)
    held_usd = UsdField(
        source="account.held", read_only=True, help_text="Granted to processes for requests, and not spent."
    )
    remaining_usd = serializers.SerializerMethodField()
    window_start = serializers.DateTimeField(source="account.window_start", read_only=True)
    resets_at = serializers.DateTimeField(
        source="begins_anew", read_only=True, allow_null=True, help_text="When it begins anew; null: never."
    )
    warned_at = serializers.DateTimeField(
        source="account.warned_at",
        read_only=True,
        allow_null=True,
        help_text="When it last reached its percentage in this window.",
    )

    class Meta:
        model = Budget
        fields: ClassVar[Any] = (
            "id", "gateway_key", "user", "team", "provider", "amount_usd", "window", "hard", "warn_at_percent", "spent_usd",
            "held_usd", "remaining_usd", "window_start", "resets_at", "warned_at", "created_by", "created_at", "updated_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = ("created_by",)
        validators: ClassVar[list[Any]] = []

    def get_remaining_usd(self, budget: Budget) -> float:
        return (budget.amount - budget.account.spent - budget.account.held) / 1_000_000_000

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        for name in SUBJECTS:
            if self.instance is not None and values.get(name, getattr(self.instance, name)) != getattr(
                self.instance, name
            ):
                raise serializers.ValidationError({name: [MOVED]})
        return values

    def create(self, values: dict[str, Any]) -> Budget:
        budget = Budget(**values, created_by=self.context["request"].user.get_username())
        budget.full_clean()
        budget.save()
        return budget


class Budgets(Rows):
    """What a gateway key, a user's keys, a team's keys or a provider may spend. A member sees his own and his teams'."""

    resource = "budgets"
    serializer_class = BudgetSerializer
    queryset = Budget.objects.select_related("gateway_key", "user", "team", "provider")
    filterset_fields = ("gateway_key", "user__username", "team__name", "provider__slug", "window", "hard")
    search_fields = ("gateway_key__name", "user__username", "team__name", "provider__name")
    ordering_fields = ("id", "amount", "created_at", "updated_at")

    def get_queryset(self) -> QuerySet[Any]:
        rows = super().get_queryset().prefetch_related(current_accounts())
        user = self.request.user
        if not user.is_authenticated:
            return rows.none()
        if roles.own_only(user, self.resource, word_of(self)):
            return rows.filter(
                Q(user=user) | Q(gateway_key__in=keys_of(user)) | Q(team__in=user.groups.all())
            )
        return rows


class KeyBudget(serializers.Serializer[Any]):
    """The fields of a gateway key that are a view of its budget."""

    budget_usd = UsdField(
        source="budget_amount",
        required=False,
        allow_null=True,
        help_text="What the key may spend in a window; null: no budget of its own. /budgets has the rest.",
    )
    budget_window = serializers.ChoiceField(
        Window.choices, required=False, allow_null=True, help_text="In UTC; left out of a new budget: month."
    )
    spent_usd = UsdField(
        source="budget_spent", read_only=True, allow_null=True, help_text="In the present window."
    )

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        amount = values.get("budget_amount", getattr(self.instance, "budget_amount", None))
        if values.get("budget_window") and amount is None and "budget_amount" not in values:
            raise serializers.ValidationError(
                {"budget_window": ["A window is that of a budget: give budget_usd."]}
            )
        return values

    @staticmethod
    def take_budget(values: dict[str, Any]) -> dict[str, Any]:
        """Out of the validated values of a key, what is said of its budget."""
        return {name: values.pop(name) for name in ("budget_amount", "budget_window") if name in values}

    @staticmethod
    def give_budget(key: GatewayKey, said: dict[str, Any]) -> None:
        """Store it."""
        if said:
            set_key_budget(key, said.get("budget_amount", key.budget_amount), said.get("budget_window"))
