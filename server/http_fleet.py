"""What is answered of a fleet over HTTP: who is followed and how, and placements. Also what an index without
a node of its own says to ``/readyz``, ``/metrics`` and ``/v1/stats``."""

from __future__ import annotations

from typing import Protocol

from kvcache.block import HINT_BYTES, NamespaceId
from kvcache.clock import Clock
from kvcache.errors import BadInput, NotAllowed
from kvcache.locality import LocalityIndex
from kvcache.metrics import HttpMetrics
from kvcache.server import http_api as api
from kvcache.server.fleet_index import FleetIndex
from kvcache.server.http_locate import named
from kvcache.server.locate_answers import states
from kvcache.wire_tuning import Tune, Tuned


class Subject(Protocol):
    """Whose HTTP address it is: a node (``http_follow.Follower``), or an index (``FleetSubject``)."""

    index: LocalityIndex

    @property
    def troubles(self) -> list[str]:
        """What is wrong with it, though it is ready."""

    @property
    def node(self) -> str: ...

    @property
    def incarnation(self) -> int: ...

    def degraded(self) -> list[str]:
        """Why it is not ready, in plain words."""

    async def stats(self) -> tuple[dict[str, float], int]:
        """Its numbers, and how many milliseconds old they are. RAISES Unavailable."""

    async def tune(self, request: Tune) -> Tuned:
        """What evicts there, or is to. RAISES Unavailable, BadInput, NotAllowed."""

    def show(self) -> None:
        """Bring the metrics of the index up to date."""


class FleetSubject:
    """An index that follows many. It is ready once it follows one of them: a router without the rest of them
    does better than without all."""

    node = ""
    incarnation = 0

    def __init__(self, fleet: FleetIndex, metrics: HttpMetrics) -> None:
        self.index = fleet.index
        self._fleet = fleet
        self._metrics = metrics

    @property
    def troubles(self) -> list[str]:
        """Of which it is ready nevertheless."""
        return self._fleet.troubles()

    def degraded(self) -> list[str]:
        followed = self._fleet.followed()
        if not followed or any(state.synced for state in self.index.sources()):
            return []
        return ["the index does not follow anybody yet"]

    async def stats(self) -> tuple[dict[str, float], int]:
        followed = self._fleet.followed()
        up = sum(each.connected for each in followed)
        return {"followed": float(len(followed)), "followed:connected": float(up)}, 0

    async def tune(self, request: Tune) -> Tuned:
        raise NotAllowed("not_allowed", "an index holds no blocks", "nothing is evicted here", "ask a node")

    def show(self) -> None:
        followed, sources = self._fleet.followed(), self.index.sources()
        self._metrics.node_connected.set(bool(followed) and all(each.connected for each in followed))
        self._metrics.index_synced.set(bool(sources) and all(each.synced for each in sources))
        self._metrics.index_entries.set(self.index.entries)
        self._metrics.index_bytes.set(self.index.bytes)
        self._metrics.count_refused(self.index.refused_blocks)


def tuning(told: Tuned) -> api.TuningReply:
    return api.TuningReply(
        tiers=told.tiers,
        hit_ratio=told.hit_ratio,
        sample=told.sample,
        seconds=told.seconds,
        shadows=told.shadows,
        advice=told.advice,
    )


def workers(fleet: FleetIndex, clock: Clock, tenant: str | None) -> api.WorkersReply:
    """What a tenant may know of; None: all of it."""
    mine = fleet.worker_sources(tenant)
    return api.WorkersReply(
        workers=mine,
        sources=[
            api.SourceState(
                source=each.source,
                state=each.state,
                partial=each.partial,
                as_of=api.AsOf(incarnation=each.incarnation, seq=each.seq, age_ms=each.age_ms),
                blocks=each.blocks,
                load=each.load,
                load_age_ms=each.load_age_ms,
            )
            for each in states(fleet.index, clock, tenant)
            if tenant is None or fleet.is_of(each.source, tenant)
        ],
        followed=[
            api.Stream(
                kind=each.kind,
                address=each.address,
                source=each.source,
                connected=each.connected,
                trouble=each.trouble,
                workers=[name for name in each.workers if name in mine],
            )
            for each in fleet.followed()
            if tenant is None or fleet.is_of(each.source, tenant)
        ],
    )


def place(
    fleet: FleetIndex, tenant: str, tenant_key: bytes, asked: api.PlacementRequest, clock: Clock
) -> api.PlacementReply:
    """RAISES BadInput for a namespace that the tenant does not have, or a prefix named in no way or two."""
    index, namespace_id = fleet.index, NamespaceId(bytes.fromhex(asked.namespace))
    namespace = index.namespace(namespace_id)
    if namespace is None or namespace.tenant != tenant:
        raise BadInput("unknown_namespace", f"no namespace {asked.namespace} is known here")
    hints = named(namespace, tenant_key, asked.tokens, asked.hashes, asked.cache_salt)
    if not fleet.is_of(asked.source, tenant):
        return api.PlacementReply(placed=0)
    refused = index.place(asked.source, namespace_id, hints, clock.now_ns())
    return api.PlacementReply(placed=len(hints) // HINT_BYTES - refused)
