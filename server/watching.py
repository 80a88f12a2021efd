"""Telling one client what changes: all to a node's own HTTP process and to peers, its own to a tenant."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.event_ring import Told
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.session import Following


class Watching:
    """The Watch of one connection."""

    def __init__(self, core: Core, identity: Identity, push: Callable[[bytes, int], None]) -> None:
        """``push`` sends a packed event batch under the call number of the Watch."""
        self._core = core
        self._identity = identity
        self._push = push
        self._begun = False
        # A peer may act for every tenant as it is, and follows all of them on one connection.
        self._sees_all = identity.inside or ("peer" in identity.roles and bool(identity.node))

    def begin(self, call: int, request: wire.Watch) -> Following:
        """What it has missed or what is there now, then every batch as it happens. RAISES NotAllowed;
        BadInput the second time."""
        self._identity.require("router", "operator", "peer")
        if self._begun:
            raise BadInput("bad_message", "a second Watch", "a connection is told everything once")
        self._begun = True

        def deliver(told: Told) -> None:
            self._push(self._visible(told), call)

        self._core.tell_all()
        owner = self._identity.owner
        before = self._core.telling.watch(owner, deliver, request.incarnation, request.seq)
        return Following(map(self._visible, before))

    def _visible(self, told: Told) -> bytes:
        """The batch, packed, as this tenant may see it. Empty ones stay: their numbers show that none was
        lost. A digest is of all tenants' blocks, so who sees a part cannot use it."""
        if self._sees_all:
            return told.packed
        batch, tenant = told.batch, self._identity.tenant
        mine = [event for event in batch.events if self._core.namespaces.tenant_of(event.namespace) == tenant]
        names = [namespace for namespace in batch.namespaces if namespace["tenant"] == tenant]
        return wire.packed(msgspec.structs.replace(batch, events=mine, namespaces=names, digests={}))
