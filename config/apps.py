import gc

from django.apps import AppConfig


class ConfigConfig(AppConfig):
    name = "config"
    verbose_name = "Configuration"

    def ready(self) -> None:
        from config import checks  # noqa: F401  # registers the system checks

        # What was loaded stays, so it need not be looked at again; manage.py and celery.py had the collector wait for this.
        gc.freeze()
        gc.enable()
