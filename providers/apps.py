from typing import Any

from django.apps import AppConfig
from django.core.management.base import CommandError
from django.db.models.signals import post_migrate, pre_migrate


class ProvidersConfig(AppConfig):
    name = "providers"
    verbose_name = "Providers"

    def ready(self) -> None:
        pre_migrate.connect(_refuse_wrong_key, sender=self, dispatch_uid="providers-check-key")
        post_migrate.connect(_make_keyring, sender=self, dispatch_uid="providers-make-keyring")


def _refuse_wrong_key(**kwargs: Any) -> None:
    """Migrate begins with the keyring: a wrong key stops it before anything is modified."""
    from providers import keyring

    try:
        keyring.load_if_stored()
    except keyring.WrongEncryptionKey as error:
        raise CommandError(str(error)) from None


def _make_keyring(using: str, **kwargs: Any) -> None:
    from providers import keyring
    from providers.models import Keyring

    if using != "default" or kwargs.get("plan") is None:
        return
    try:
        if Keyring.objects.exists():
            keyring.load_if_changed()
        else:
            keyring.ensure()
    except keyring.WrongEncryptionKey as error:
        raise CommandError(str(error)) from None
