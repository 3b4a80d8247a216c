"""The admin pages of gateway keys, their owners' limits, model routes, prices and usage, and the start page."""

from proxy.admin import keys, owners, prices, routes, usage

__all__ = ["keys", "owners", "prices", "routes", "usage"]
