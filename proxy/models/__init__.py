from proxy.models.keys import GatewayKey, GatewayKeyUse
from proxy.models.owners import OwnerLimits
from proxy.models.prices import ModelPrice, PriceList
from proxy.models.routes import Mode, ModelRoute, RouteNode, Strategy
from proxy.models.usage import SpoolSegment, UsageHour, UsageRecord

__all__ = [
    "GatewayKey",
    "GatewayKeyUse",
    "Mode",
    "ModelPrice",
    "ModelRoute",
    "OwnerLimits",
    "PriceList",
    "RouteNode",
    "SpoolSegment",
    "Strategy",
    "UsageHour",
    "UsageRecord",
]
