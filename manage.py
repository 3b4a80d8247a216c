#!/usr/bin/env python
"""Django's command line, with Penstock's settings."""

import gc
import os
import sys


def main() -> None:
    gc.disable()  # until all is loaded (config/apps.py): a fifth of the start
    os.environ.setdefault("DJANGO_SETTINGS_MODULE", "config.settings")
    from django.core.management import execute_from_command_line

    execute_from_command_line(sys.argv)


if __name__ == "__main__":
    main()
