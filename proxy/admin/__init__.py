"""The admin pages of gateway keys, model routes and usage, and the start page."""

from proxy.admin import backups, keys, routes, usage

__all__ = ["backups", "keys", "routes", "usage"]
