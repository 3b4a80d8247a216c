from proxy.models.budgets import Budget, BudgetAccount, BudgetGrant, Window
from proxy.models.keys import GatewayKey, GatewayKeyUse
from proxy.models.owners import OwnerLimits
from proxy.models.prices import ModelPrice, PriceList
from proxy.models.routes import Mode, ModelRoute, RouteNode, Strategy
from proxy.models.texts import TextRecord
from proxy.models.usage import SpoolSegment, UsageHour, UsageRecord

__all__ = [
    "Budget",
    "BudgetAccount",
    "BudgetGrant",
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
    "TextRecord",
    "UsageHour",
    "UsageRecord",
    "Window",
]
