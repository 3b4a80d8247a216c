"""The admin pages of gateway keys, model routes, prices and usage, and the start page."""

from proxy.admin import keys, prices, routes, usage

__all__ = ["keys", "prices", "routes", "usage"]
