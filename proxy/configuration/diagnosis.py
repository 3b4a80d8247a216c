"""What `doctor` says of the backup on this machine."""

from __future__ import annotations

from django.conf import settings

from providers.diagnosis import Finding
from proxy.configuration import files


def backup_findings() -> list[Finding]:
    return [Finding(f"backup {settings.BACKUP_FILE}", problem) for problem in files.problems()]
