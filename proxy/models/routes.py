"""Public model names of our own: a route decides which provider and model answer."""

from __future__ import annotations

from typing import Any, ClassVar

from django.core.exceptions import ValidationError
from django.db import models
from django.db.models import CheckConstraint, Q, UniqueConstraint

from audit.changes import Identity
from providers.models import Provider
from providers.models.checks import check_metadata
from providers.models.provider import Managed, Versioned

MAX_NODE_MODELS = 200
RESERVED = ("auto", "default")
"""What means the active provider, so no route may be called that."""


class Mode(models.TextChoices):
    AUTO = "auto", "Auto: one group, by strategy"
    SPECIFIC = "specific", "Specific: the caller's hint selects"
    MULTI = "multi", "Multi: groups by priority"


class Strategy(models.TextChoices):
    ROUND_ROBIN = "round-robin", "Round-robin"
    FAILOVER = "failover", "Failover"
    WEIGHTED = "weighted", "Weighted"
    LEAST_BUSY = "least-busy", "Least busy"
    FASTEST = "fastest", "Fastest"
    CHEAPEST = "cheapest", "Cheapest"


def check_name(name: str) -> None:
    """A model name that means nothing else: `<slug>/<model>` has a slash, `auto` is the active provider."""
    if not name.isprintable() or name != name.strip() or "/" in name:
        raise ValidationError("Write printable characters without a slash, and no space at the ends.")
    if name.casefold() in RESERVED:
        raise ValidationError(f"{name} means the active provider.")


def check_node_models(names: Any) -> None:
    if not isinstance(names, list) or not all(
        isinstance(name, str) and 0 < len(name) <= 255 and name.isprintable() and name == name.strip()
        for name in names
    ):
        raise ValidationError("Write a list of model names.")
    if len(names) > MAX_NODE_MODELS:
        raise ValidationError(f"At most {MAX_NODE_MODELS} models.")
    if len(set(names)) != len(names):
        raise ValidationError("A model stands there twice.")


class ModelRoute(Managed, Versioned):
    """A model name that applications ask for. Its nodes, in order, are where it may lead.

    resume: whether a stream that broke is taken up by the next node; None is the general default, which is on.
    """

    name = models.CharField(
        max_length=128,
        unique=True,
        validators=[check_name],
        help_text="What applications write as the model, like “fast” or “support-chat”.",
    )
    mode = models.CharField(max_length=16, choices=Mode, default=Mode.AUTO)
    strategy = models.CharField(max_length=16, choices=Strategy, default=Strategy.ROUND_ROBIN)
    is_active = models.BooleanField("active", default=True)
    resume = models.BooleanField(
        "resume broken streams",
        null=True,
        blank=True,
        help_text="Whether a stream that broke is taken up by the next node. Unknown: the default, which is yes.",
    )
    config = models.JSONField(default=dict, blank=True, validators=[check_metadata])

    class Meta:
        verbose_name = "model route"
        ordering: ClassVar = ["name", "id"]
        constraints: ClassVar = [
            CheckConstraint(condition=Q(mode__in=Mode.values), name="route_mode_is_known"),
            CheckConstraint(condition=Q(strategy__in=Strategy.values), name="route_strategy_is_known"),
            CheckConstraint(
                condition=~Q(name="") & ~Q(name__contains="/") & ~Q(name__in=RESERVED),
                name="route_name_is_a_model_name",
            ),
        ]

    def __str__(self) -> str:
        return self.name

    def clean(self) -> None:
        """`<route>/<hint>` of a specific route must not take the place of `<provider slug>/<model>`."""
        if self.mode == Mode.SPECIFIC and Provider.objects.filter(slug=self.name).exists():
            raise ValidationError(
                {
                    "name": f"{self.name} is the slug of a provider, whose models are asked for as {self.name}/<model>."
                }
            )

    def audit_identity(self) -> Identity:
        return Identity("model_route", str(self.pk), self.name, "model_route")


class RouteNode(models.Model):
    """A provider, and models of it, at a position of a route."""

    route = models.ForeignKey(ModelRoute, on_delete=models.CASCADE, related_name="nodes")
    position = models.PositiveSmallIntegerField()
    provider = models.ForeignKey(Provider, on_delete=models.PROTECT, related_name="route_nodes")
    strategy = models.CharField(
        max_length=16, choices=Strategy, blank=True, help_text="Empty: the route's. Overrides it."
    )
    weight = models.PositiveIntegerField(
        default=1, help_text="Its share with the strategy weighted. 0: only as a fallback."
    )
    priority = models.IntegerField(
        default=0, help_text="In mode multi: the group; lower groups are tried first."
    )
    metadata = models.JSONField(default=dict, blank=True, validators=[check_metadata])
    # The last column, since from here on the name no longer means Django's module.
    models = models.JSONField(
        default=list,
        blank=True,
        validators=[check_node_models],
        help_text="Empty: the provider's models for the purpose.",
    )

    class Meta:
        verbose_name = "node"
        ordering: ClassVar = ["route", "position"]
        constraints: ClassVar = [
            UniqueConstraint(fields=["route", "position"], name="node_position_is_unique"),
            CheckConstraint(
                condition=Q(strategy__in=["", *Strategy.values]), name="node_strategy_is_known_or_empty"
            ),
            CheckConstraint(condition=Q(weight__gte=0), name="node_weight_is_not_negative"),
        ]

    def __str__(self) -> str:
        return f"{self.provider}{f' ({self.models[0]}, ...)' if self.models else ''}"

    def audit_identity(self) -> Identity:
        return Identity(
            "model_route",
            str(self.route_id),
            self.route.name,
            "model_route",
            verb="update",
            prefix=f"nodes.{self.position}.",
        )
