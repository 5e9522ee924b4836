"""How not to ask the system for the same memory again and again. Imports no model library."""

import ctypes
import os
import sys
from functools import cache
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # of glibc's malloc.h
_M_MMAP_THRESHOLD: Final = -3
_LARGEST_MMAP_THRESHOLD: Final = 32 << 20  # more is refused by glibc
_KEPT_BYTES: Final = 1 << 30
_CHOSEN: Final = ("MALLOC_", "GLIBC_TUNABLES")


@cache
def keep_freed_memory() -> bool:
    """Have the C library keep up to 1 GiB of what is freed, for the next tensors, instead of giving it back at once.

    A forward on a CPU frees and takes the same megabytes hundreds of times an image; each time the system maps and
    clears pages anew. What that costs is in the benchmark's figures, where a bare backbone runs with and without.
    The setting is the process's: the command line makes it when it starts, a program that embeds lostreg may call this
    once, before its first image. It is left alone where the user has chosen one (an environment variable
    ``MALLOC_...`` or ``GLIBC_TUNABLES``) and where the C library is not glibc.

    Returns:
        Whether the setting was made.

    Example:
        >>> lostreg.keep_freed_memory() in (True, False)
        True
    """
    if not sys.platform.startswith("linux") or any(name.startswith(_CHOSEN) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
