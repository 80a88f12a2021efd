"""What a node says of how busy it is, with every beat: plain numbers by name (``EventBatch.load``).

Other sources say other things, an engine how many requests it runs; who reads them takes what it knows and
leaves the rest. ``NODE_LOAD`` is the whole of what a node says, and docs/events.md lists it.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NODE_LOAD: Mapping[str, str] = MappingProxyType(
    {
        "capacity_bytes": "memory for blocks",
        "free_bytes": "of that, what no block takes: a store that is warm has none",
        "leases": "readers that hold blocks",
        "reservations": "writers that have room for blocks and have not committed them",
        "coming_bytes": "on their way into memory, from NVMe and from other nodes",
    }
)
