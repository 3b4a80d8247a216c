from proxy.models.keys import GatewayKey, GatewayKeyUse
from proxy.models.usage import SpoolSegment, UsageRecord

__all__ = ["GatewayKey", "GatewayKeyUse", "SpoolSegment", "UsageRecord"]
