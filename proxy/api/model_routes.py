"""Model routes: their nodes are written whole, and they can be asked what they would do."""

from __future__ import annotations

from typing import Any, ClassVar

from django.db.models.query import QuerySet
from django_filters import rest_framework as filters
from drf_spectacular.types import OpenApiTypes
from drf_spectacular.utils import OpenApiParameter, extend_schema
from rest_framework import serializers
from rest_framework.decorators import action
from rest_framework.request import Request
from rest_framework.response import Response

from audit.api_bulk import Bulk
from audit.api_errors import Conflict
from audit.api_views import MAX_INTEGER, KnownFields, Rows, StrictSerializer
from providers.models import Provider
from providers.models.checks import check_metadata
from proxy import dry_run
from proxy.errors import NoProviderAvailable
from proxy.models import ModelRoute, Strategy
from proxy.models.routes import check_node_models
from proxy.routes import MAX_NODES, set_nodes

NUMBER: dict[str, Any] = {"required": False, "min_value": 1, "max_value": 2**63 - 1}


class NodeSerializer(KnownFields):
    """A place where the route may lead."""

    id = serializers.IntegerField(read_only=True)
    provider_id = serializers.IntegerField(**NUMBER, help_text="The id of a provider or server.")
    api_id = serializers.IntegerField(
        **NUMBER, source="provider_id", help_text="Another name of `provider_id`."
    )
    models = serializers.ListField(
        child=serializers.CharField(max_length=255),
        required=False,
        validators=[check_node_models],
        help_text="Empty: the provider's models for the purpose.",
    )
    strategy = serializers.ChoiceField(
        Strategy.choices, required=False, allow_blank=True, help_text="Empty: the route's. Overrides it."
    )
    weight = serializers.IntegerField(
        required=False,
        min_value=0,
        max_value=MAX_INTEGER,
        help_text="Its share with the strategy `weighted`; 0: only as a fallback.",
    )
    priority = serializers.IntegerField(
        required=False,
        min_value=-MAX_INTEGER,
        max_value=MAX_INTEGER,
        help_text="The group in mode `multi`; lower ones are tried first.",
    )
    metadata = serializers.JSONField(
        required=False, validators=[check_metadata], help_text="`price`: a number for `cheapest`."
    )

    def to_internal_value(self, data: Any) -> Any:
        if isinstance(data, dict):
            data = self._one_name(data)
        return super().to_internal_value(data)

    def _one_name(self, data: dict[str, Any]) -> dict[str, Any]:
        """`api_id` under its other name; in a node that was read and edited, the name that was edited wins."""
        data = dict(data)
        alias = data.pop("api_id", None)
        if alias is None:
            return data
        given = data.get("provider_id")
        if given is None or given == self._stored(data.get("id")):
            data["provider_id"] = alias
        elif alias not in (given, self._stored(data.get("id"))):
            message = "This is another name of provider_id, which says otherwise."
            raise serializers.ValidationError({"api_id": [message]})
        return data

    def _stored(self, id: Any) -> int | None:
        """The provider of a stored node of this route."""
        route = getattr(self.root, "instance", None)
        nodes = route.nodes.all() if isinstance(route, ModelRoute) else ()
        return next((node.provider_id for node in nodes if node.pk == id), None)

    def validate(self, values: dict[str, Any]) -> dict[str, Any]:
        number = values.pop("provider_id", None)
        if number is None:
            raise serializers.ValidationError({"provider_id": ["This field is required."]})
        provider = Provider.objects.filter(pk=number).first()
        if provider is None:
            raise serializers.ValidationError({"provider_id": ["There is no such provider."]})
        return {"provider": provider, **values}


class ModelRouteSerializer(StrictSerializer[ModelRoute]):
    volatile: ClassVar = frozenset({"updated_at"})

    nodes = NodeSerializer(many=True, required=False)

    class Meta:
        model = ModelRoute
        fields: ClassVar[Any] = (
            "id", "name", "mode", "strategy", "is_active", "resume", "config", "nodes", "managed_by", "created_by", "created_at", "updated_at",
        )  # fmt: skip
        read_only_fields: ClassVar[Any] = ("managed_by", "created_by")
        validators: ClassVar[list[Any]] = []

    def validate_nodes(self, values: list[Any]) -> list[Any]:
        if len(values) > MAX_NODES:
            raise serializers.ValidationError(f"At most {MAX_NODES} nodes.")
        return values

    def create(self, values: dict[str, Any]) -> ModelRoute:
        nodes = values.pop("nodes", ())
        route = ModelRoute(**values, created_by=self.user.get_username())
        route.full_clean()
        route.save()
        set_nodes(route, nodes)
        return route

    def update(self, route: ModelRoute, values: dict[str, Any]) -> ModelRoute:
        """The version is the route's and its nodes' together."""
        nodes = values.pop("nodes", None)
        saved = self.put(route, values)
        if nodes is not None and set_nodes(route, nodes) and not saved:
            route.save()
        return route


class AskSerializer(KnownFields):
    model = serializers.CharField(
        required=False,
        allow_blank=True,
        allow_null=True,
        max_length=255,
        help_text="A hint, as after the slash in `<route>/<hint>`; it counts in mode `specific`.",
    )


class SelectionSerializer(serializers.Serializer[Any]):
    provider_id = serializers.IntegerField()
    provider_name = serializers.CharField()
    model = serializers.CharField()
    why = serializers.ListField(child=serializers.CharField())


class RouteStateSerializer(serializers.Serializer[Any]):
    route_id = serializers.IntegerField()
    route_name = serializers.CharField()
    state = serializers.DictField(
        help_text="What the process that answers remembers. `round_robin_indices`: per group (a priority in mode `multi`, "
        "else the route's id) the place of the node whose turn is next."
    )


class RouteFilter(filters.FilterSet):  # type: ignore[misc]
    provider = filters.NumberFilter(
        field_name="nodes__provider", distinct=True, min_value=1, max_value=NUMBER["max_value"]
    )

    class Meta:
        model = ModelRoute
        fields: ClassVar = ["name", "mode", "strategy", "is_active"]


class ModelRoutes(Bulk, Rows):
    """Public model names that lead to nodes, by a mode and a strategy."""

    resource = "routes"
    switch = "is_active"
    words: ClassVar = {"select": "test", "state": "read"}
    serializer_class = ModelRouteSerializer
    queryset: QuerySet[ModelRoute] = ModelRoute.objects.prefetch_related("nodes__provider")
    filterset_class = RouteFilter
    search_fields = ("name",)
    ordering_fields = ("id", "name", "mode", "strategy", "is_active", "created_at", "updated_at")

    @extend_schema(
        request=AskSerializer,
        responses=SelectionSerializer,
        parameters=[OpenApiParameter("dry_run", OpenApiTypes.BOOL, description="true: no turn is used up.")],
    )
    @action(detail=True, methods=["post"])
    def select(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """Where the next request to this route would go, and why. 503 when all its providers are unhealthy."""
        form = AskSerializer(data=request.data)
        form.is_valid(raise_exception=True)
        route = self.get_object()
        if not route.is_active:
            raise Conflict("This route is not active.")
        peek = request.query_params.get("dry_run", "").lower() in {"true", "1"}
        result = dry_run.run(route, hint=form.validated_data.get("model") or "", peek=peek)
        if (chosen := result.chosen) is None:
            raise NoProviderAvailable(f"No provider of {route.name} can take a request now.")
        return Response(
            {
                "provider_id": chosen.provider_id,
                "provider_name": chosen.provider_name,
                "model": chosen.model,
                "why": _why(route, result, chosen),
            }
        )

    @extend_schema(responses=RouteStateSerializer)
    @action(detail=True, methods=["get"], pagination_class=None, filter_backends=[])
    def state(self, request: Request, *args: Any, **kwargs: Any) -> Response:
        """What this process remembers of the route: whose turn is next, who is busy, who is fast."""
        return Response(dry_run.state(self.get_object()))


def _why(route: ModelRoute, result: dry_run.DryRun, chosen: dry_run.Step) -> list[str]:
    """The rule, and a line for each step up to the chosen one."""
    lines = [
        f"{step.slug}/{step.model}: {step.obstacle or step.reason}"
        for step in result.steps
        if step.place <= chosen.place
    ]
    return [f"route {route.name}: {route.mode}, {route.strategy}", *lines, *result.notes]
