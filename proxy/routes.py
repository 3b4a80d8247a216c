"""Changing the nodes of a model route: always all of them, as a list."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.core.exceptions import ValidationError

from proxy.models import ModelRoute, RouteNode

MAX_NODES = 50
DEFAULTS: Mapping[str, Any] = {"models": [], "strategy": "", "weight": 1, "priority": 0, "metadata": {}}


def set_nodes(route: ModelRoute, nodes: Sequence[Mapping[str, Any]]) -> bool:
    """Make these the nodes of `route`, in this order; whether that changed anything.

    nodes: columns of RouteNode, with `provider` and without `position`; what is left out gets its default. Inside
    `audit.changes`, where it joins the route's entry. Raises ValidationError.
    """
    if len(nodes) > MAX_NODES:
        raise ValidationError({"nodes": f"At most {MAX_NODES} nodes."})
    stored = {node.position: node for node in route.nodes.select_related("route")}
    changed = False
    for position, columns in enumerate(nodes):
        row = stored.pop(position, None) or RouteNode(route=route, position=position)
        changed = _write(row, {**DEFAULTS, **columns}) or changed
    for row in stored.values():
        row.delete()
    return changed or bool(stored)


def _write(row: RouteNode, columns: Mapping[str, Any]) -> bool:
    if row.pk and all(getattr(row, name) == value for name, value in columns.items()):
        return False
    for name, value in columns.items():
        setattr(row, name, value)
    row.full_clean()
    row.save()
    return True
