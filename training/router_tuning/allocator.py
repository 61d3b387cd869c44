"""malloc on a CPU: glibc hands large blocks back to the system when they are freed, and the next forward pass takes the
same ones again, page by page: a sixth of the CPU time of `fit`, more than a quarter where late layers are measured.
"""

from __future__ import annotations

import ctypes
import os
import sys

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_OWN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to its own peak. Nothing where the libc is not glibc, or was told by its
    environment what to do.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 1 << 30)  # blocks below come from the heap…
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)  # …whose end is not given back
