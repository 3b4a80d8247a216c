"""The admin pages of gateway keys, their owners' limits, budgets, model routes, prices and usage, and the start page."""

from proxy.admin import backups, budgets, keys, owners, prices, routes, usage

__all__ = ["backups", "budgets", "keys", "owners", "prices", "routes", "usage"]
