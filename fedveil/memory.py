"""How this process treats memory that it has freed."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1  # glibc's malloc.h
_M_MMAP_THRESHOLD = -3
_LARGER_THAN_ANY_TENSOR = 1 << 30


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, instead of giving it back to the system.

    Every training step frees gradients as large as the model, and every step of an attack those of
    all its victims. Given back, their pages are faulted in again by the next step. Linux with glibc
    only; elsewhere it does nothing.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_M_MMAP_THRESHOLD, _LARGER_THAN_ANY_TENSOR)
            libc.mallopt(_M_TRIM_THRESHOLD, _LARGER_THAN_ANY_TENSOR)
