"""Blocks that are given to a peer while they are still being written, plane after plane."""

from __future__ import annotations

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.session import Answer, Later


class Streams:
    """What one connection advances and follows."""

    def __init__(self, core: Core, identity: Identity) -> None:
        self._core = core
        self._identity = identity

    def advance(self, request: wire.Advance) -> Answer | Later:
        """RAISES BadInput (bad_reservation) when it is not open."""
        self._identity.require("writer")
        self._core.ledger.reserved(request.reservation, self._identity.owner)
        return wire.Done()

    def follow(self, request: wire.Follow) -> Answer | Later:
        """RAISES BadInput (unknown_namespace, bad_prefix)."""
        self._identity.require("peer")
        self._identity.require("reader")
        opened = self._core.namespace(request.namespace, self._identity.tenant)
        held = self._core.ledger.match(self._core.keys(opened, request.prefix, wire.BATCH_BLOCKS_MAX))
        if held:
            return wire.Followed("held", held)
        raise BadInput("bad_tier", f"this node moves no blocks over {request.via!r:.20}", "")
