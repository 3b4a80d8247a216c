"""The admin pages of providers, servers, keys, models, active providers and health."""

from providers.admin import active, health, keys, models, providers

__all__ = ["active", "health", "keys", "models", "providers"]
