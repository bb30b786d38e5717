"""The memory allocator, set for training on a CPU."""
import ctypes


def keep_memory():
    """Tells glibc to keep freed memory. Otherwise every step gets fresh pages, which the kernel
    fills with zeros: 10 to 20 % of a CFT step of `small`. Does nothing where there is no glibc."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)            # M_MMAP_MAX: no allocation is a mapping of its own
        libc.mallopt(-1, 2 ** 31 - 1)  # M_TRIM_THRESHOLD: nothing is given back
