"""Blocks that leave or come over a transport, on behalf of one connection.

lease ── export ─► ticket, its blocks held ── released, connection or time over ─► withdrawn ─► let go
reservation ── post ─► ticket ── filled ─► written ── commit ...
                          └── abort, connection over ─► withdrawn ─► slots free
"""

from __future__ import annotations

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.session import Answer, Later


class Exports:
    """What one connection has exported and posted."""

    def __init__(self, core: Core, identity: Identity) -> None:
        self._core = core
        self._identity = identity

    def export(self, request: wire.Export) -> Answer | Later:
        """RAISES BadInput when the lease does not hold these blocks, or no transport is there."""
        self._identity.require("reader")
        raise _no_transport(request.via)

    def post(self, request: wire.Post) -> Answer | Later:
        """RAISES BadInput when the reservation is not open, or no transport is there."""
        self._identity.require("writer")
        raise _no_transport(request.via)


def _no_transport(via: str) -> BadInput:
    return BadInput(
        "bad_tier",
        f"this node moves no blocks over {via!r:.20}",
        "it has no data address of that scheme",
        "start it with --data, for instance tcp://127.0.0.1:0",
    )
