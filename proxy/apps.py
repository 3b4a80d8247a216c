from django.apps import AppConfig


class ProxyConfig(AppConfig):
    name = "proxy"
    verbose_name = "Gateway"

    def ready(self) -> None:
        from providers import diagnosis
        from proxy.configuration.diagnosis import backup_findings

        diagnosis.know(backup_findings)
