"""Memory of freed tensors, kept for the next ones.

The C library of Linux gives the memory of each large tensor back to the system when it is freed, and gets the next one
page by page, filled with zeros: in a report on a vision transformer a quarter of the processor time went there. The
commands of this library therefore keep what they have freed until they end. A library may not decide that for the
program that uses it: only `lipbounds.cli` and processes of its own call this.
"""

from __future__ import annotations

import ctypes
from contextlib import suppress


TRIM_THRESHOLD, MMAP_MAX = -1, -4  # options of mallopt(3) in glibc
NEVER = -1


def keep_freed_memory() -> None:
    """Have this process keep the memory it has freed; with another C library than glibc nothing changes."""
    with suppress(OSError, TypeError, AttributeError):  # no such library, no such function
        options = ctypes.CDLL(None).mallopt
        options(MMAP_MAX, 0)
        options(TRIM_THRESHOLD, NEVER)
