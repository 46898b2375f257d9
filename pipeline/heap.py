"""What glibc does with memory that was freed.

By default it gives large pieces back to the system, and each step of a model on a CPU gets its activations anew, page
by page, zeroed: 1,100 to 1,400 page faults an image, a twelfth of a step's time, for a ViT of 5.5 million weights.
"""

from __future__ import annotations

import ctypes

# The numbers and the largest threshold are those of glibc's malloc.h
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_LARGEST_THRESHOLD = 32 << 20
_NEVER = 2**31 - 1


def keep_freed_memory() -> bool:
    """Has this process keep what it frees in pieces of up to 32 MiB, for its next use; False without glibc."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl has none, and Windows no such library
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST_THRESHOLD) and mallopt(_TRIM_THRESHOLD, _NEVER))
