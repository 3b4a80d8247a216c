"""Database triggers that make the audit log append-only, on both databases.

They are made after every migrate, because SQLite drops a table's triggers when a migration rebuilds it.
"""

from __future__ import annotations

from django.db.backends.base.base import BaseDatabaseWrapper

POSTGRESQL = """
CREATE OR REPLACE FUNCTION audit_entry_is_append_only() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN RAISE EXCEPTION 'the audit log is append-only'; END $$;
CREATE OR REPLACE TRIGGER audit_entry_keep BEFORE UPDATE OR DELETE ON audit_entry
    FOR EACH ROW EXECUTE FUNCTION audit_entry_is_append_only();
CREATE OR REPLACE TRIGGER audit_entry_keep_all BEFORE TRUNCATE ON audit_entry
    FOR EACH STATEMENT EXECUTE FUNCTION audit_entry_is_append_only();
"""
SQLITE = tuple(
    f"CREATE TRIGGER IF NOT EXISTS audit_entry_keep_{verb.lower()} BEFORE {verb} ON audit_entry "
    "BEGIN SELECT RAISE(ABORT, 'the audit log is append-only'); END"
    for verb in ("UPDATE", "DELETE")
)
LIFT = {
    "postgresql": (
        "DROP TRIGGER IF EXISTS audit_entry_keep ON audit_entry",
        "DROP TRIGGER IF EXISTS audit_entry_keep_all ON audit_entry",
    ),
    "sqlite": tuple(f"DROP TRIGGER IF EXISTS audit_entry_keep_{verb}" for verb in ("update", "delete")),
}


def set_triggers(connection: BaseDatabaseWrapper) -> None:
    """Make the triggers if they are not there."""
    with connection.cursor() as cursor:
        for statement in (POSTGRESQL,) if connection.vendor == "postgresql" else SQLITE:
            cursor.execute(statement)


def lift_triggers(connection: BaseDatabaseWrapper) -> None:
    """Take the triggers away; only for emptying a test database."""
    with connection.cursor() as cursor:
        for statement in LIFT[connection.vendor]:
            cursor.execute(statement)
