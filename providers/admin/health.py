"""Testing, discovering models and overriding by hand, from a provider's page; and the history of probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from django.contrib import admin, messages
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseRedirect
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.safestring import SafeString

from audit.admin import ReadOnlyAdmin, write
from audit.roles import may
from providers.admin import probing
from providers.admin.badges import ago, badge, health_badge, health_of
from providers.errors import ProviderError
from providers.health import TestResult, set_override
from providers.models import HealthCheck, Provider

if TYPE_CHECKING:
    from audit.admin import AuditedAdmin as Base
else:
    Base = object

DECISIONS = {"in": True, "out": False, "probes": None}
COLOURS = {"online": "good", "degraded": "warn"}


class HealthViews(Base):
    """What a page about an endpoint can do besides editing. Nothing is dialled inside a change (see audit.changes)."""

    object_views: ClassVar = (
        ("test", "test_view"),
        ("discover", "discover_view"),
        ("override", "override_view"),
    )
    actions: Any = ("test_selected",)
    unrecorded_actions: ClassVar = frozenset({"test_selected"})
    change_form_outer_before_template: ClassVar = "admin/providers/health_card.html"

    def has_test_permission(self, request: HttpRequest) -> bool:
        return may(request.user, "providers", "test")

    @admin.action(description="Test the selected ones", permissions=["test"])
    def test_selected(self, request: HttpRequest, queryset: QuerySet[Any]) -> None:
        chosen = list(queryset[: probing.AT_ONCE])
        for provider, result in zip(chosen, probing.test_all(chosen), strict=True):
            level = messages.SUCCESS if result.status == "online" else messages.WARNING
            messages.add_message(request, level, f"{provider.name}: {probing.in_one_line(result)}")
        if queryset.count() > probing.AT_ONCE:
            messages.info(
                request, f"Only the first {probing.AT_ONCE} were tested; the probes test all of them anyway."
            )

    def test_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        provider = self._asked(request, object_id, "test")
        if request.method != "POST":
            return HttpResponseRedirect(self._change_url(provider))
        return self._result_page(request, provider, *probing.test_all([provider]))

    def discover_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        provider = self._asked(request, object_id, "change")
        if request.method == "POST":
            try:
                messages.success(request, probing.discover(provider, request))
            except ProviderError as error:
                messages.error(
                    request, f"{provider.name} did not tell its models: {error.text} {error.detail[:300]}"
                )
        return HttpResponseRedirect(self._change_url(provider))

    def override_view(self, request: HttpRequest, object_id: str) -> HttpResponseBase:
        provider = self._asked(request, object_id, "override")
        decision = request.POST.get("decision")
        if request.method == "POST" and decision in DECISIONS:
            return write(request, lambda: self._overridden(request, provider, DECISIONS[decision]))
        return HttpResponseRedirect(self._change_url(provider))

    def _overridden(self, request: HttpRequest, provider: Provider, decision: bool | None) -> HttpResponse:
        set_override(provider, decision)
        words = {True: "was put in by hand", False: "was taken out by hand", None: "is left to its probes"}
        messages.success(request, f"{provider.name} {words[decision]}.")
        return HttpResponseRedirect(self._change_url(provider))

    def _asked(self, request: HttpRequest, object_id: str, action: str) -> Any:
        if not may(request.user, "providers", action):
            raise PermissionDenied
        provider = self.get_object(request, object_id)
        if provider is None:
            raise Http404
        return provider

    def _change_url(self, provider: Provider) -> str:
        return reverse(f"admin:providers_{self.opts.model_name}_change", args=[provider.pk])

    def _result_page(self, request: HttpRequest, provider: Provider, result: TestResult) -> HttpResponse:
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": f"Test of {provider.name}",
            "provider": provider,
            "result": result,
            "online": result.status == "online",
            "badge": badge(result.status, COLOURS.get(result.status, "bad")),
            "change_url": self._change_url(provider),
            "urls": self._urls(provider),
            "can_discover": bool(result.models) and may(request.user, "models", "add"),
        }
        return TemplateResponse(request, "admin/providers/test_result.html", context)

    def _urls(self, provider: Provider) -> dict[str, str]:
        name = f"admin:providers_{self.opts.model_name}"
        return {view: reverse(f"{name}_{view}", args=[provider.pk]) for view, _ in self.object_views}

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        provider = kwargs.get("obj")
        if provider is not None:
            context = {
                **context,
                "health": health_of(provider),
                "health_badge": health_badge(provider),
                "health_changed": ago(getattr(health_of(provider), "changed_at", None)),
                "urls": self._urls(provider),
                "models_link": f"{reverse('admin:providers_upstreammodel_changelist')}?provider__id__exact={provider.pk}",
                "models_known": provider.upstream_models.filter(enabled=True).count(),
                "can_test": may(request.user, "providers", "test"),
                "can_override": may(request.user, "providers", "override"),
                "can_discover": may(request.user, "models", "add"),
            }
        return super().render_change_form(request, context, *args, **kwargs)


@admin.register(HealthCheck)
class HealthCheckAdmin(ReadOnlyAdmin):
    list_display = ("at", "provider", "seen", "status_code", "latency", "detail")
    list_filter = ("at", "status", "provider")
    list_select_related = ("provider",)
    date_hierarchy = "at"
    fields = ("at", "provider", "status", "status_code", "latency", "detail")

    @admin.display(description="Status", ordering="status")
    def seen(self, check: HealthCheck) -> SafeString:
        return badge(str(check.get_status_display()).lower(), COLOURS.get(check.status, "bad"))

    @admin.display(description="Latency", ordering="latency_ms")
    def latency(self, check: HealthCheck) -> str:
        return "-" if check.latency_ms is None else f"{check.latency_ms:.0f} ms"
