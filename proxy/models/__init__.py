from proxy.models.budgets import Budget, BudgetAccount, BudgetGrant, Window
from proxy.models.keys import GatewayKey, GatewayKeyUse
from proxy.models.prices import ModelPrice, PriceList
from proxy.models.routes import Mode, ModelRoute, RouteNode, Strategy
from proxy.models.usage import SpoolSegment, UsageRecord

__all__ = [
    "Budget",
    "BudgetAccount",
    "BudgetGrant",
    "GatewayKey",
    "GatewayKeyUse",
    "Mode",
    "ModelPrice",
    "ModelRoute",
    "PriceList",
    "RouteNode",
    "SpoolSegment",
    "Strategy",
    "UsageRecord",
    "Window",
]
