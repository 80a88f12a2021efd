"""What messages say of blocks in HBM: the slab that is mapped, and leases in it.

A connection has one slab or none, for its life. Its blocks have leases and reservations of their own: the
messages that end them (``Release``, ``Commit``, ``Abort``) name the tier.
"""

from __future__ import annotations

import msgspec

from kvcache.wire_base import Unsigned

HOST, HBM = "host", "hbm"
HBM_WAIT_MS = 5_000
"""So long a node keeps a Hello that asks for HBM waiting for the GPU's memory: the first engine of a GPU."""


class HbmSlab(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``kind`` is cuda or cpu, ``gpu`` the UUID of the GPU. ``incarnation`` names this memory
    and no other."""

    kind: str
    size_bytes: Unsigned
    gpu: bytes
    incarnation: bytes


class HbmLeased(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The leading ``count`` blocks of what was asked for, at these byte offsets of the slab of this
    ``incarnation``. ``lease`` is 0 when ``count`` is. ``checksums`` joins 16 bytes a block."""

    lease: Unsigned
    count: Unsigned
    offsets: list[Unsigned]
    generations: list[Unsigned]
    checksums: bytes
    incarnation: bytes


NO_SLAB = HbmSlab("", 0, b"", b"")
NOTHING_LEASED = HbmLeased(0, 0, [], [], b"", b"")
