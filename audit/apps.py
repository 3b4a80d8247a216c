from typing import Any

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class AuditConfig(AppConfig):
    name = "audit"
    verbose_name = "Audit"

    def ready(self) -> None:
        from audit import receivers, roles
        from audit.access import second_factor

        receivers.connect()
        second_factor.connect()
        roles.connect()
        post_migrate.connect(_prepare, sender=self, dispatch_uid="audit-prepare")


def _prepare(using: str, **kwargs: Any) -> None:
    """After every migrate: the head's row, and the triggers that keep the log append-only."""
    from django.db import connections

    from audit.models import Head
    from audit.triggers import set_triggers

    Head.objects.using(using).get_or_create(pk=1)
    set_triggers(connections[using])
