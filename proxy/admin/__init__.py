"""The admin pages of gateway keys and usage, and the start page."""

from proxy.admin import keys, usage

__all__ = ["keys", "usage"]
