"""Telling one client what changes: all to a node's own HTTP process and to peers, its own to a tenant."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kvcache import wire
from kvcache.errors import BadInput
from kvcache.server.core import Core
from kvcache.server.identity import Identity
from kvcache.server.session import Following


class Watching:
    """The Watch of one connection."""

    def __init__(self, core: Core, identity: Identity, push: Callable[[wire.EventBatch, int], None]) -> None:
        """``push`` sends an event batch under the call number of the Watch."""
        self._core = core
        self._identity = identity
        self._push = push
        self._begun = False
        # A peer may act for every tenant as it is, and follows all of them on one connection.
        self._sees_all = identity.inside or ("peer" in identity.roles and bool(identity.node))

    def begin(self, call: int) -> Following:
        """What is there now, then every batch as it happens. RAISES NotAllowed; BadInput the second time."""
        self._identity.require("router", "operator", "peer")
        if self._begun:
            raise BadInput("bad_message", "a second Watch", "a connection is told everything once")
        self._begun = True

        def deliver(batch: wire.EventBatch) -> None:
            self._push(self._visible(batch), call)

        return Following(map(self._visible, self._core.watch(self._identity.owner, deliver)))

    def _visible(self, batch: wire.EventBatch) -> wire.EventBatch:
        """The batch as this tenant may see it. Empty ones stay: their numbers show that none was lost."""
        if self._sees_all:
            return batch
        tenant = self._identity.tenant
        mine = [event for event in batch.events if self._core.tenant_of(event.namespace) == tenant]
        names = [namespace for namespace in batch.namespaces if namespace["tenant"] == tenant]
        return msgspec.structs.replace(batch, events=mine, namespaces=names, digests={})
