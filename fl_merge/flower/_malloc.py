"""Freed memory goes back to the system.

glibc keeps what is freed in blocks below a threshold, which rises to 32 MiB by itself, and Flower's messages are made
of blocks of 5 MiB: a server would keep, in pieces and once for each thread that fetched a reply, as much as it ever had
at a time. `malloc_trim` gives back free pages, but for those at the end of other threads' memory, some 50 MB each. So
the threshold is fixed, at the price of new page faults for each large block.
"""

from __future__ import annotations

import contextlib
import ctypes
import os

_M_MMAP_THRESHOLD = -3
_THRESHOLD = 1 << 20
_fixed = False


def give_back_large_blocks() -> None:
    """From now on blocks above 1 MiB are given back to the system when they are freed, in all of this process.

    Nothing happens where the C library has no such setting, or where whoever started the process has set it.
    """
    global _fixed
    tuned = "MALLOC_MMAP_THRESHOLD_" in os.environ or "mmap_threshold" in os.environ.get("GLIBC_TUNABLES", "")
    if _fixed or tuned:
        return
    _fixed = True
    with contextlib.suppress(AttributeError, OSError, TypeError):  # not glibc
        ctypes.CDLL(None).mallopt(ctypes.c_int(_M_MMAP_THRESHOLD), ctypes.c_int(_THRESHOLD))
