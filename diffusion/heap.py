"""Large arrays beside the heap, so that their memory is the system's again when they are freed."""

import ctypes
import sys

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_LARGE = 4 * 2**20


def keep_large_apart() -> None:
    """Of this process, from now on.

    When a mapped array of up to 32 MiB is freed, glibc takes the next ones of its size from the heap, where what is freed
    below others stays: some 30 MiB, between matrices of features by features.  A fixed threshold ends that.  [mallopt(3)]
    Elsewhere nothing is done.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
