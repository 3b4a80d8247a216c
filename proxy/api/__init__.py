"""The API of what applications hold: gateway keys."""
