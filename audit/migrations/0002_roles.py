"""The four roles, as groups. Their permissions are assigned after every migrate, from the table in audit/roles.py."""

from typing import Any

from django.db import migrations

ROLES = ("viewer", "operator", "administrator", "member")


def add_roles(apps: Any, schema_editor: Any) -> None:
    group = apps.get_model("auth", "Group")
    for name in ROLES:
        group.objects.get_or_create(name=name)


class Migration(migrations.Migration):
    dependencies = [("audit", "0001_initial"), ("auth", "0012_alter_user_first_name_max_length")]

    operations = [migrations.RunPython(add_roles, migrations.RunPython.noop)]
