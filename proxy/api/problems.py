"""How errors of the data plane are answered by the control plane, where it asks what the data plane would do."""

from __future__ import annotations

from audit.api_errors import RETRY_SECONDS, Problem, know
from proxy.errors import GatewayError, ModelNotFound, NoProviderAvailable


def _of_model(error: ModelNotFound) -> Problem:
    return Problem(400, "The request is not valid.", {error.param or "model": [error.text]})


def _of_providers(error: NoProviderAvailable) -> Problem:
    return Problem(503, error.text, retry_after=RETRY_SECONDS)


def _of_gateway(error: GatewayError) -> Problem:
    return Problem(error.status, error.text)


know(ModelNotFound, _of_model)
know(NoProviderAvailable, _of_providers)
know(GatewayError, _of_gateway)
