"""The admin pages of gateway keys, budgets, model routes, prices and usage, and the start page."""

from proxy.admin import budgets, keys, prices, routes, usage

__all__ = ["budgets", "keys", "prices", "routes", "usage"]
