"""Memory that a process has freed and keeps, so that the next tensor does not wait for the system to clear pages.

glibc gives large blocks back to the system when they are freed. Every forward pass on a CPU then asks for hundreds of
megabytes again, and each page of 4 KiB of them is a fault, in which the kernel clears it. Two settings end that, and
neither does alone: no block has a mapping of its own (M_MMAP_MAX), and the heap is not trimmed (M_TRIM_THRESHOLD).
"""

import ctypes
import os
import sys

__all__ = ["SWITCH", "is_kept", "keep_freed_memory"]

SWITCH = "TRANSMAMBA_KEEP_MEMORY"
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_NEVER_TRIM = -1


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, from now on; return whether it does.

    It makes computing on a CPU faster: page faults go, and nothing else changes. What it costs: freed memory is not
    given back to the system before the process ends, so it stays at its peak for other processes.
    Only glibc on Linux has these settings. On musl, macOS and Windows nothing happens, nor where the environment has
    TRANSMAMBA_KEEP_MEMORY=0. It cannot be taken back.
    """
    mallopt = _find_mallopt() if is_kept() else None
    if mallopt is None:
        return False
    # In this order: a heap that is not trimmed has glibc map every block beyond 128 KiB by itself, if it still may.
    return mallopt(_M_MMAP_MAX, 0) == 1 and mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM) == 1


def is_kept() -> bool:
    """Whether keep_freed_memory would keep it here."""
    return os.environ.get(SWITCH, "1") != "0" and _find_mallopt() is not None


def _find_mallopt() -> "ctypes._NamedFuncPointer | None":
    """glibc's mallopt; None where there is another C library."""
    if not sys.platform.startswith("linux"):
        return None
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has no mallopt
        return None
    mallopt = library.mallopt
    mallopt.argtypes, mallopt.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    return mallopt
