"""How freed memory is kept: else the time of a step on a CPU is a matter of luck."""

import ctypes
import platform

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets glibc's malloc reuse what a training step frees; nothing happens where the C library is another one.

    By default glibc gives large blocks back to the system as soon as they are freed, unless something small lies behind
    them, and a step's activations, megabytes each, come as new pages every time, which the kernel has to clear.
    Source: https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # M_MMAP_THRESHOLD ends at 32 MB; the features of 55,000 images are 113
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)
