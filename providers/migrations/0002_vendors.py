"""One disabled provider for each vendor, so that a new installation only needs a key: the first key enables it."""

from typing import Any

from django.db import migrations

from providers.adapters import KINDS, VENDORS


def add_vendors(apps: Any, schema_editor: Any) -> None:
    provider = apps.get_model("providers", "Provider")
    for kind in (KINDS[name] for name in sorted(VENDORS)):
        if not provider.objects.filter(slug=kind.name).exists() and not provider.objects.filter(name=kind.label).exists():
            provider.objects.create(
                slug=kind.name, name=kind.label, kind=kind.name, base_url=kind.base_url.rstrip("/"), enabled=False
            )


class Migration(migrations.Migration):
    dependencies = [("providers", "0001_initial")]

    operations = [migrations.RunPython(add_vendors, migrations.RunPython.noop)]
