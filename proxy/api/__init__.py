"""The API of what applications hold and ask for: gateway keys and model routes."""

from proxy.api import problems  # noqa: F401  # makes the errors of the data plane known to the API
