"""Budgets: how much, and how far it is; also as a part of the page of a gateway key."""

from __future__ import annotations

from decimal import Decimal
from typing import Any, ClassVar

from django import forms
from django.contrib import admin
from django.db.models import QuerySet
from django.http import HttpRequest
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.widgets import UnfoldAdminSelectWidget, UnfoldAdminTextInputWidget

from audit.admin import AuditedAdmin, VersionedForm
from audit.admin.versions import ModelForm
from providers.admin.badges import badge
from proxy.models import Budget, BudgetAccount, Window
from proxy.models.budgets import MOST_USD, SUBJECTS, current_accounts, set_key_budget
from proxy.pricing import dollars_of, nano_of


class AmountField(forms.DecimalField):
    """US dollars, typed and shown; a whole number of nano-dollars for everybody else."""

    def __init__(self, **kwargs: Any) -> None:
        widget = UnfoldAdminTextInputWidget(attrs={"inputmode": "decimal", "placeholder": "25"})
        super().__init__(
            min_value=Decimal(0),
            max_value=Decimal(MOST_USD),
            max_digits=19,
            decimal_places=9,
            widget=widget,
            **kwargs,
        )

    def prepare_value(self, value: Any) -> Any:
        return f"{dollars_of(value):f}" if isinstance(value, int) else value

    def has_changed(self, initial: Any, data: Any) -> bool:
        return super().has_changed(self.prepare_value(initial), data)

    def clean(self, value: Any) -> Any:
        dollars = super().clean(value)
        return None if dollars is None else nano_of(dollars)


class BudgetForm(VersionedForm):
    amount = AmountField(label="Amount", help_text="US dollars for each window.")

    class Meta:
        model = Budget
        fields: ClassVar[list[str]] = []
        help_texts: ClassVar = {
            "user": "All keys of this person together.",
            "team": "All keys of this team together.",
            "provider": "When it is used up, the next provider is asked.",
            "window": "It begins anew at midnight UTC.",
            "hard": "Refuses requests that could exceed it (402). Otherwise it only warns.",
            "warn_at_percent": "From this part of the amount on it is marked here, and one line is logged.",
        }


@admin.register(Budget)
class BudgetAdmin(AuditedAdmin):
    form = BudgetForm
    list_display = ("of", "amount_shown", "window", "used", "state", "begins")
    list_filter = ("window", "hard")
    search_fields = ("gateway_key__name", "user__username", "team__name", "provider__name")
    search_help_text = "Search by key, user, team or provider"
    list_select_related = SUBJECTS
    autocomplete_fields = SUBJECTS
    derived = (BudgetAccount,)
    change_form_outer_before_template = "admin/proxy/budget_card.html"
    fieldsets = (
        ("Whose it is: one of these", {"fields": SUBJECTS}),
        (None, {"fields": ("amount", "window", "hard", "warn_at_percent")}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).prefetch_related(current_accounts())

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        sets = super().get_fieldsets(request, obj)
        return sets if obj is None else ((None, {"fields": (obj.subject_kind,)}), *sets[1:])

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """It stays with whom it is of, and so does what was spent of it."""
        return () if obj is None else SUBJECTS

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        return super().render_change_form(request, {**context, **card(kwargs.get("obj"))}, *args, **kwargs)

    @admin.display(description="Of")
    def of(self, budget: Budget) -> str:
        return budget.subject_name

    @admin.display(description="Amount", ordering="amount")
    def amount_shown(self, budget: Budget) -> str:
        return usd(budget.amount)

    @admin.display(description="Spent and held")
    def used(self, budget: Budget) -> SafeString:
        return bar(budget)

    @admin.display(description="State")
    def state(self, budget: Budget) -> SafeString:
        return state_badge(budget)

    @admin.display(description="Begins anew (UTC)")
    def begins(self, budget: Budget) -> str:
        return begins_anew(budget)


class KeyBudgetForm(ModelForm):
    """The fields of a gateway key's page that are a view of its budget."""

    budget_usd = AmountField(
        label="Budget",
        required=False,
        help_text="What it may spend in a window, in US dollars. Empty: no budget of its own. Budgets has more, "
        "such as one that only warns.",
    )
    budget_window = forms.ChoiceField(
        label="Window",
        choices=Window.choices,
        required=False,
        initial=Window.MONTH,
        widget=UnfoldAdminSelectWidget(choices=Window.choices),
        help_text="It begins anew at midnight UTC.",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk and self.instance.budget_amount is not None:
            self.initial["budget_usd"] = self.instance.budget_amount
            self.initial["budget_window"] = self.instance.budget_window

    def save_budget(self) -> None:
        """After the key is saved. A form without these fields says nothing about the budget."""
        if {"budget_usd", "budget_window"} & set(self.changed_data):
            set_key_budget(
                self.instance, self.cleaned_data["budget_usd"], self.cleaned_data.get("budget_window") or None
            )


def card(budget: Budget | None) -> dict[str, Any]:
    """What the card of a budget shows, as context of a page."""
    if budget is None:
        return {}
    return {
        "budget": budget,
        "budget_bar": bar(budget),
        "budget_state": state_badge(budget),
        "budget_amount": usd(budget.amount),
        "budget_begins": begins_anew(budget),
        "budget_since": budget.account.window_start if budget.window != Window.TOTAL else None,
    }


def bar(budget: Budget) -> SafeString:
    account = budget.account
    used = min(100, 100 * (account.spent + account.held) // budget.amount) if budget.amount else 100
    held = f", {usd(account.held)} held" if account.held else ""
    return format_html(
        '<progress class="ps-bar" max="100" value="{}" aria-label="{} % used"></progress> <span class="ps-quiet">{}{} of {}</span>',
        used, used, usd(account.spent), held, usd(budget.amount),
    )  # fmt: skip


def state_badge(budget: Budget) -> SafeString:
    spent = budget.account.spent
    if spent >= budget.amount:
        title = "Requests are refused until it begins anew." if budget.hard else "It only warns."
        return badge("used up", "bad" if budget.hard else "warn", title)
    if spent * 100 >= budget.amount * budget.warn_at_percent:
        return badge(f"over {budget.warn_at_percent} %", "warn")
    return badge("within", "good") if budget.hard else badge("only warns", "plain")


def begins_anew(budget: Budget) -> str:
    moment = budget.begins_anew
    return "never" if moment is None else f"{moment:%Y-%m-%d %H:%M}"


def usd(nano: int) -> str:
    """ "$2.50"; small amounts with as many digits as they need."""
    dollars = dollars_of(nano)
    return f"${dollars:.2f}" if dollars == round(dollars, 2) else f"${dollars.normalize():f}"
