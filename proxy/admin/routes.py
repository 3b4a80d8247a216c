"""Model routes with their nodes, and a look at what a request would meet."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, ClassVar

from django import forms
from django.contrib import admin
from django.core.exceptions import PermissionDenied
from django.db.models import QuerySet
from django.http import Http404, HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.html import format_html
from django.utils.safestring import SafeString
from unfold.widgets import UnfoldAdminIntegerFieldWidget

from audit.admin import AuditedAdmin, VersionedForm
from audit.admin.versions import ModelForm
from providers.admin import places
from providers.admin.badges import badge, health_badge, health_of
from providers.admin.fields import LinesField, ObjectField
from providers.models import Provider
from proxy import dry_run
from proxy.errors import GatewayError
from proxy.models import ModelRoute, RouteNode
from proxy.routes import DEFAULTS, MAX_NODES, set_nodes

if TYPE_CHECKING:
    StackedInline = admin.StackedInline[Any, Any]
else:
    from unfold.admin import StackedInline

LAST = 10_000
"""Where a node without a place goes."""

NAMED = 3
"""How many nodes the list names."""


class RouteForm(VersionedForm):
    config = ObjectField()

    class Meta:
        model = ModelRoute
        fields: ClassVar[list[str]] = []


class NodeForm(ModelForm):
    """A node; its place is a number that people may change freely, and the nodes are numbered anew when saved."""

    place = forms.IntegerField(
        required=False,
        min_value=1,
        max_value=LAST,
        widget=UnfoldAdminIntegerFieldWidget(),
        help_text="Its place in the order. Empty: at the end.",
    )
    models = LinesField(rows=2, help_text="One in each line. Empty: the provider's models for the purpose.")
    metadata = ObjectField()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.instance.pk:
            self.initial["place"] = self.instance.position + 1

    class Meta:
        model = RouteNode
        fields: ClassVar[list[str]] = []


class NodeInline(StackedInline):
    model = RouteNode
    form = NodeForm
    fields = (("place", "provider"), "models", ("strategy", "weight", "priority"), "metadata")
    extra = 0
    max_num = MAX_NODES
    verbose_name_plural = "nodes"


@admin.register(ModelRoute)
class ModelRouteAdmin(AuditedAdmin):
    form = RouteForm
    inlines = (NodeInline,)
    list_display = ("name", "mode", "strategy", "leads_to", "state")
    list_filter = ("is_active", "mode", "strategy")
    search_fields = ("name",)
    search_help_text = "Search by name"
    derived = (RouteNode,)
    object_views = (("dry-run", "dry_run_view"),)
    change_form_outer_before_template = "admin/proxy/route_card.html"
    fieldsets = (
        (None, {"fields": ("name", "mode", "strategy", "is_active")}),
        ("Advanced", {"classes": ("collapse",), "fields": ("resume", "config")}),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[Any]:
        return super().get_queryset(request).prefetch_related("nodes__provider__health")

    @admin.display(description="Nodes")
    def leads_to(self, route: ModelRoute) -> str:
        names = [str(node) for node in route.nodes.all()]
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return ", ".join(names[:NAMED]) + more or "-"

    @admin.display(description="State", ordering="is_active")
    def state(self, route: ModelRoute) -> SafeString:
        return state_badge(route)

    def save_formset(self, request: HttpRequest, form: Any, formset: Any, change: bool) -> None:
        """All nodes at once, in the order of their places, as through the API."""
        formset.save(commit=False)
        rows = [row.cleaned_data for row in formset.forms if row.cleaned_data.get("provider")]
        kept = [row for row in rows if not row.get("DELETE")]
        kept.sort(key=lambda row: row.get("place") or LAST)
        set_nodes(form.instance, [{name: row[name] for name in ("provider", *DEFAULTS)} for row in kept])

    def render_change_form(self, request: HttpRequest, context: Any, *args: Any, **kwargs: Any) -> Any:
        route = kwargs.get("obj")
        if route is not None:
            context = {**context, "route_state": state_badge(route)}
        return super().render_change_form(request, context, *args, **kwargs)

    def dry_run_view(self, request: HttpRequest, object_id: str) -> HttpResponse:
        """In which order a request would try the nodes now, and why; nothing is sent and nothing remembered."""
        if not self.has_view_or_change_permission(request):
            raise PermissionDenied
        route = self.get_object(request, object_id)
        if route is None:
            raise Http404
        hint = request.GET.get("model", "").strip()[:255]
        result, problem = None, ""
        try:
            result = dry_run.run(route, hint=hint)
        except GatewayError as error:
            problem = error.text
        context = {
            **self.admin_site.each_context(request),
            "opts": self.opts,
            "title": f"What “{route.name}” would do now",
            "route": route,
            "hint": hint,
            "result": result,
            "problem": problem,
            "steps": _with_health(result.steps) if result else (),
        }
        return TemplateResponse(request, "admin/proxy/dry_run.html", context)


def _with_health(steps: Iterable[dry_run.Step]) -> list[tuple[dry_run.Step, SafeString]]:
    steps = list(steps)
    found = Provider.objects.select_related("health").in_bulk([step.provider_id for step in steps])
    return [(step, health_badge(found[step.provider_id])) for step in steps if step.provider_id in found]


def state_badge(route: ModelRoute) -> SafeString:
    """Whether it is on, and how many of its nodes are well."""
    nodes = list(route.nodes.all())
    well = sum(_is_well(node.provider) for node in nodes)
    if not route.is_active:
        return badge("off", "plain", "Nobody can ask for it.")
    if not nodes:
        return badge("leads nowhere", "warn", "It has no nodes.")
    colour = "bad" if not well else "good" if well == len(nodes) else "warn"
    return badge(f"active, {well} of {len(nodes)} well", colour)


def _is_well(provider: Provider) -> bool:
    health = health_of(provider)
    return provider.enabled and (health is None or health.is_healthy)


def uses_in_routes(providers: list[int]) -> list[SafeString]:
    nodes = RouteNode.objects.filter(provider__in=providers).select_related("route", "provider")
    return [
        format_html(
            '{} is a node of the route {}: <a class="ps-link" href="{}">take it out there first</a>.',
            node.provider.name,
            node.route.name,
            reverse("admin:proxy_modelroute_change", args=[node.route_id]),
        )
        for node in nodes
    ]


places.know(uses_in_routes)
