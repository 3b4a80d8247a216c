from django.apps import AppConfig


class ProxyConfig(AppConfig):
    name = "proxy"
    verbose_name = "Gateway"

    def ready(self) -> None:
        from providers import rotation
        from proxy.texts_sealed import Texts

        rotation.TABLES.append(Texts())
