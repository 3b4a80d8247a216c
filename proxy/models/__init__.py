from proxy.models.keys import GatewayKey, GatewayKeyUse
from proxy.models.routes import Mode, ModelRoute, RouteNode, Strategy
from proxy.models.texts import TextRecord
from proxy.models.usage import SpoolSegment, UsageRecord

__all__ = [
    "GatewayKey",
    "GatewayKeyUse",
    "Mode",
    "ModelRoute",
    "RouteNode",
    "SpoolSegment",
    "Strategy",
    "TextRecord",
    "UsageRecord",
]
