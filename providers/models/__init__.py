from providers.models.active import ActiveProvider, ActiveTarget, Purpose
from providers.models.health import HealthCheck, JobRun, KeyUse, ProviderHealth, ProviderUse, Status, Verdict
from providers.models.keyring import Keyring
from providers.models.provider import ApiKey, Provider, Server, UpstreamModel

__all__ = [
    "ActiveProvider",
    "ActiveTarget",
    "ApiKey",
    "HealthCheck",
    "JobRun",
    "KeyUse",
    "Keyring",
    "Provider",
    "ProviderHealth",
    "ProviderUse",
    "Purpose",
    "Server",
    "Status",
    "UpstreamModel",
    "Verdict",
]
