"""The admin pages of the audit log, users and roles, and the base of all other admin pages."""

from audit.admin import log, people
from audit.admin.base import AuditedAdmin, ReadOnlyAdmin
from audit.admin.door import guarded, recorded, write
from audit.admin.versions import VersionedForm, overwritten, row_version

__all__ = [
    "AuditedAdmin",
    "ReadOnlyAdmin",
    "VersionedForm",
    "guarded",
    "log",
    "overwritten",
    "people",
    "recorded",
    "row_version",
    "write",
]
