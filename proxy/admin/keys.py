"""Gateway keys: issued, rotated and revoked here; the whole key is shown once, in the answer that made it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from django.conf import settings
from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils import timezone
from django.utils.safestring import SafeString

from audit.admin import AuditedAdmin, VersionedForm, write
from audit.roles import may
from providers.admin.badges import ago, badge, counted, spent
from providers.admin.fields import LinesField
from providers.models import ActiveProvider, Provider
from providers.models.limited import LIMITS
from proxy import keys
from proxy.admin.budgets import KeyBudgetForm, card, usd
from proxy.admin.owners import limits_of
from proxy.models import Budget, BudgetAccount, GatewayKey, GatewayKeyUse
from proxy.owners import text_of

BUDGET = ("budget_usd", "budget_window")
REACH = ("allowed_models", "allowed_networks")
KEPT = ("cache_seconds", "record_text")


class GatewayKeyForm(KeyBudgetForm, VersionedForm):
    allowed_models = LinesField(
        help_text="One in each line; * stands for anything. Empty: all models. Example: openai/gpt-*"
    )
    allowed_networks = LinesField(help_text="One in each line. Empty: from anywhere. Example: 10.0.0.0/8")

    class Meta:
        model = GatewayKey
        fields: ClassVar[list[str]] = []
        help_texts: ClassVar = {
            "name": "Who or what will use it, like “support chatbot”.",
            "owner": "Whose usage this is. The key stops working when this person's account is disabled or deleted.",
            "team": "In place of one person. Its members see the key through the API, and it is deleted with the team.",
            "expires_at": "Empty: never.",
            **dict.fromkeys(LIMITS, "Empty: no limit."),
            "max_concurrency": "Requests at the same time. Empty: no limit.",
            "record_text": "The beginning of each request and answer is kept, sealed, for as long as TEXT_RETENTION_DAYS says, and "
            "administrators can read it on the usage record's page. Tell the people whose words they are.",
            "cache_seconds": "For how long the same question at temperature 0 gets the same answer without asking a provider, "
            "among the keys of one owner that have this. Empty: never.",
            "resume_streams": "Whether another provider, or the same once more, goes on with a stream that broke. "
            "Unknown: as the route or the active provider says. A request's header x-penstock-resume beats this.",
        }

    def clean_max_concurrency(self) -> int | None:
        """Emptied means no limit; a form that does not have the field at all gets what it would have been filled with."""
        if self.instance.pk is None and self.add_prefix("max_concurrency") not in self.data:
            return keys.default_concurrency()
        found: int | None = self.cleaned_data["max_concurrency"]
        return found


@admin.register(GatewayKey)
class GatewayKeyAdmin(AuditedAdmin):
    form = GatewayKeyForm
    list_display = (
        "name",
        "shown_key",
        "state",
        "holder",
        "expires_at",
        "requests",
        "tokens",
        "cost",
        "last_used",
    )
    # Not everybody who may see keys may see who else there is.
    list_filter = (
        "enabled",
        "record_text",
        ("owner", admin.RelatedOnlyFieldListFilter),
        ("team", admin.RelatedOnlyFieldListFilter),
    )
    list_select_related = ("owner", "team", "use", "budget")
    search_fields = ("name", "=key_id", "owner__username", "team__name")
    search_help_text = "Search by name, id or owner"
    derived = (GatewayKeyUse, Budget, BudgetAccount)
    object_views = (("rotate", "rotate_view"), ("revoke", "revoke_view"), ("empty-cache", "empty_cache_view"))
    change_form_outer_before_template = "admin/proxy/key_state.html"
    fieldsets = (
        (None, {"fields": ("name", "owner", "team", "enabled", "expires_at")}),
        ("Limits", {"fields": (*LIMITS, "inherited")}),
        ("Budget", {"fields": BUDGET}),
        ("What it may reach, and from where", {"fields": REACH}),
        ("When a stream breaks", {"fields": ("resume_streams",)}),
        ("What is kept", {"fields": KEPT}),
    )

    def get_fieldsets(self, request: HttpRequest, obj: Any = None) -> Any:
        """A new key is enabled; there is nothing to choose."""
        sets = super().get_fieldsets(request, obj)
        return (
            sets
            if obj is not None
            else ((None, {"fields": ("name", "owner", "team", "expires_at")}), *sets[1:])
        )

    def get_changeform_initial_data(self, request: HttpRequest) -> dict[str, Any]:
        return {
            "max_concurrency": keys.default_concurrency(),
            **super().get_changeform_initial_data(request),
        }

    def get_readonly_fields(self, request: HttpRequest, obj: Any = None) -> Any:
        """An operator issues, rotates and revokes; what is revoked stays as it was."""
        if obj is None or (may(request.user, "gateway_keys", "change") and obj.revoked_at is None):
            return ("inherited",)
        return (
            "name", "owner", "team", "enabled", "expires_at", *LIMITS, "inherited", *BUDGET, *REACH, *KEPT, "resume_streams",
        )  # fmt: skip

    @admin.display(description="Owner")
    def holder(self, key: GatewayKey) -> str:
        return text_of(key.holder) or "-"

    @admin.display(description="Shared with the owner's other keys")
    def inherited(self, key: GatewayKey) -> SafeString | str:
        return limits_of(key.holder)

    @admin.display(description="Key", ordering="key_id")
    def shown_key(self, key: GatewayKey) -> str:
        return f"{key.prefix}…{key.last4}"

    @admin.display(description="Budget (US dollars)")
    def budget_usd(self, key: GatewayKey) -> str:
        return "-" if key.budget_amount is None else usd(key.budget_amount)

    @admin.display(description="Window")
    def budget_window(self, key: GatewayKey) -> str:
        return key.budget_window or "-"

    @admin.display(description="State")
    def state(self, key: GatewayKey) -> SafeString:
        return state_badge(key)

    @admin.display(description="Requests", ordering="use__requests_count")
    def requests(self, key: GatewayKey) -> str:
        return counted(key, "requests_count")

    @admin.display(description="Tokens", ordering="use__tokens_used")
    def tokens(self, key: GatewayKey) -> str:
        return counted(key, "tokens_used")

    @admin.display(description="Cost", ordering="use__cost_nanodollars")
    def cost(self, key: GatewayKey) -> str:
        return spent(key)

    @admin.display(description="Last used", ordering="use__last_used_at")
    def last_used(self, key: GatewayKey) -> str:
        use = getattr(key, "use", None)
        return ago(use.last_used_at if use is not None else None)

    def save_model(self, request: HttpRequest, obj: Any, form: Any, change: bool) -> None:
        if not change:
            # For the answer to this request only; nothing else ever holds the whole key.
            obj.whole = keys.give_secret(obj)
        super().save_model(request, obj, form, change)
        form.save_budget()

    def response_add(
        self, request: HttpRequest, obj: Any, post_url_continue: str | None = None
    ) -> HttpResponse:
        return self._issued_page(request, obj, obj.whole)

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        obj = kwargs.get("obj")
        context = {**context, "show_save_and_add_another": False, "show_save_and_continue": obj is not None}
        if obj is not None:
            usable = obj.revoked_at is None and self.has_change_permission(request, obj)
            context = {**context, "key_state": state_badge(obj), "key_usable": usable}
            context["key_last_used"] = self.last_used(obj)
            context |= card(getattr(obj, "budget", None))
        return super().render_change_form(request, context, *args, **kwargs)

    def rotate_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        return self._confirmed(request, object_id, "admin/proxy/rotate.html", "Rotate", self._rotated)

    def revoke_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        return self._confirmed(request, object_id, "admin/proxy/revoke.html", "Revoke", self._revoked)

    def empty_cache_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        return self._confirmed(
            request, object_id, "admin/proxy/empty_cache.html", "Empty the cache of", self._emptied
        )

    def _confirmed(
        self,
        request: HttpRequest,
        object_id: str,
        template: str,
        verb: str,
        act: Callable[[HttpRequest, Any], HttpResponse],
    ) -> HttpResponseBase:
        """A question when asked by GET, the deed when sent by POST."""
        if not self.has_change_permission(request):
            raise PermissionDenied
        if request.method == "POST":
            return write(request, lambda: act(request, self._usable(request, object_id)))
        key = self._usable(request, object_id)
        context = {"title": f"{verb} {key.name}?", "key": key, "overlap": keys.DEFAULT_OVERLAP}
        return self._page(request, template, context)

    def _usable(self, request: HttpRequest, object_id: str) -> Any:
        key = self.get_object(request, object_id)
        if key is None or key.revoked_at is not None:
            raise Http404
        return key

    def _rotated(self, request: HttpRequest, key: Any) -> HttpResponse:
        return self._issued_page(request, key, keys.rotate(key), rotated=True)

    def _revoked(self, request: HttpRequest, key: Any) -> HttpResponse:
        keys.revoke(key)
        messages.success(request, f"{key.name} is revoked. Nobody can use it any more.")
        return HttpResponseRedirect(reverse("admin:proxy_gatewaykey_changelist"))

    def _emptied(self, request: HttpRequest, key: Any) -> HttpResponse:
        keys.empty_cache(key)
        messages.success(request, f"No answer that was kept for {key.name} until now is given again.")
        return HttpResponseRedirect(reverse("admin:proxy_gatewaykey_change", args=[key.pk]))

    def _issued_page(
        self, request: HttpRequest, key: Any, whole: str, *, rotated: bool = False
    ) -> HttpResponse:
        context = {
            "title": f"The key “{key.name}”",
            "key": key,
            "whole": whole,
            "rotated": rotated,
            "base_url": f"{settings.PUBLIC_URL}/v1",
            "model": curl_model(),
        }
        return self._page(request, "admin/proxy/issued.html", context)

    def _page(self, request: HttpRequest, template: str, context: dict[str, Any]) -> HttpResponse:
        base = {**self.admin_site.each_context(request), "opts": self.opts}
        return TemplateResponse(request, template, {**base, **context})


def state_badge(key: GatewayKey) -> SafeString:
    if key.revoked_at is not None:
        return badge(f"revoked {ago(key.revoked_at)}", "bad")
    if key.expires_at is not None and key.expires_at <= timezone.now():
        return badge(f"expired {ago(key.expires_at)}", "bad")
    if not key.enabled:
        return badge("off", "plain")
    if key.owner is not None and not key.owner.is_active:
        return badge("its owner is disabled", "warn")
    if key.record_text:
        return badge("active, keeps what is said", "warn")
    return badge("active", "good")


def curl_model() -> str:
    """A model that the line to paste can ask for now."""
    if ActiveProvider.objects.filter(purpose="chat").exists():
        return "auto"
    return "echo/echo" if Provider.objects.filter(slug="echo", enabled=True).exists() else "auto"
