"""Memory that processes share: a descriptor that nobody can shrink under who maps it.

Measured: without the seal, an ``ftruncate(0)`` by one process ends every other that touches its map with
SIGBUS. So who makes such memory seals it, and who is handed some maps it only when it is sealed.
"""

from __future__ import annotations

import fcntl
import os

from kvcache.errors import BadInput

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


def create(name: str, size_bytes: int, *, huge_pages: bool = False) -> int:
    """A new descriptor of zeroed memory: mode 0600, closed on exec, every seal in ``SEALS``.

    RAISES OSError when the system refuses the memory."""
    flags = os.MFD_ALLOW_SEALING | os.MFD_CLOEXEC | (os.MFD_HUGETLB if huge_pages else 0)
    descriptor = os.memfd_create(f"kvcache-{name}"[:200], flags)
    try:
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size_bytes)
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def check(descriptor: int, size_bytes: int) -> None:
    """Can ``size_bytes`` of it be mapped for good? RAISES BadInput (unsafe_slab) when not."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise unsafe("it is no memory that can be sealed") from error
    if not seals & fcntl.F_SEAL_SHRINK:
        raise unsafe("it is not sealed against shrinking")
    size = os.fstat(descriptor).st_size
    if size_bytes <= 0 or size < size_bytes:
        raise unsafe(f"it has {size} bytes where {size_bytes} were announced")


def unsafe(why: str) -> BadInput:
    """The error for memory that is not mapped."""
    return BadInput(
        "unsafe_slab",
        "the shared memory that the node offers is refused",
        why,
        "run the same release of kvcache on both sides, or use a tcp:// address",
    )
