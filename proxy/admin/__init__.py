"""The admin pages of gateway keys, model routes and usage, and the start page."""

from proxy.admin import keys, routes, usage

__all__ = ["keys", "routes", "usage"]
