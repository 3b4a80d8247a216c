"""The admin pages of gateway keys, their owners' limits, model routes and usage, and the start page."""

from proxy.admin import keys, owners, routes, usage

__all__ = ["keys", "owners", "routes", "usage"]
