"""Loaded by every process that has this folder on its path: says ten times a second whether it can be dumped.

DUMPABLE_FOLDER: gets a file named by the process's id with what prctl(PR_GET_DUMPABLE) answers. From outside only a user other
than root could see it.
"""

import ctypes
import os
import threading
import time

_PR_GET_DUMPABLE = 3  # <linux/prctl.h>
_folder = os.environ["DUMPABLE_FOLDER"]


def _say() -> None:
    while True:
        with open(os.path.join(_folder, str(os.getpid())), "w", encoding="ascii") as file:
            file.write(str(ctypes.CDLL(None).prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0)))
        time.sleep(0.1)


def _begin() -> None:
    threading.Thread(target=_say, daemon=True).start()


os.register_at_fork(after_in_child=_begin)
_begin()
