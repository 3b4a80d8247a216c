"""The API of providers: servers, vendors, their keys, and which of them is active."""

from providers.api import problems  # noqa: F401  # makes the errors of providers known to the API
