from django.apps import AppConfig


class ProxyConfig(AppConfig):
    name = "proxy"
    verbose_name = "Gateway"

    def ready(self) -> None:
        from providers import diagnosis, rotation
        from proxy.configuration.diagnosis import backup_findings
        from proxy.texts_sealed import Texts

        rotation.TABLES.append(Texts())
        diagnosis.know(backup_findings)
