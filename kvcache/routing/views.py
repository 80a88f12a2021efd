"""Views of a real index: one in this process, or one that runs elsewhere and is asked over a socket.

    LocalityIndex ──IndexView──►   ┐
    Locator ───────LocatorView──►  ┴ what a choice needs (kvcache.routing.view)

The sum: in this process 2 us a query, 1 us a source; elsewhere 25 us a query on a unix socket, and twice a
second what the sources are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvcache.block import HASH_BYTES, NamespaceId
from kvcache.clock import NS_PER_MS, Clock
from kvcache.errors import KVCacheError
from kvcache.fleet import Worker
from kvcache.locality import LocalityIndex, Located
from kvcache.locate_wire import NAMESPACES_MAX
from kvcache.locator import Locator, Matches, Names, Source
from kvcache.namespace import Namespace
from kvcache.routing.names import Query
from kvcache.routing.telemetry import Told
from kvcache.routing.view import Found, SourceState

REFRESH_NS = 500 * NS_PER_MS


class IndexView:
    """Of an index in this process. ``node_source``: what the node at a control address calls itself, empty
    while that is not known; without it, workers have the sources that the fleet's file names."""

    def __init__(
        self, index: LocalityIndex, clock: Clock, node_source: Callable[[str], str] = lambda address: ""
    ) -> None:
        self._index = index
        self._clock = clock
        self._node_source = node_source
        self._known: list[NamespaceId] = []
        self._namespaces: Mapping[NamespaceId, Namespace] = {}

    def namespaces(self) -> Mapping[NamespaceId, Namespace]:
        known = self._index.known_namespaces()
        if known != self._known:
            told = {each: self._index.namespace(each) for each in known}
            self._known = known
            self._namespaces = {each: found for each, found in told.items() if found is not None}
        return self._namespaces

    def sources_of(self, worker: Worker) -> Sequence[str]:
        own = worker.own_sources()
        node = self._node_source(worker.node) if worker.node else ""
        return [*own, node] if node and node not in own else own

    def find(self, queries: Sequence[Query]) -> Found:
        now_ns = self._clock.now_ns()
        try:
            rows = [self._index.match(each.hints, each.namespaces).located() for each in queries]
        except KVCacheError as error:
            return Found(trouble=str(error))
        return Found(rows, {each.source: self._state(each.source, now_ns) for each in self._index.sources()})

    def place(self, source: str, namespace: NamespaceId, hints: bytes) -> None:
        self._index.place(source, namespace, hints, self._clock.now_ns())

    def _state(self, source: str, now_ns: int) -> SourceState:
        as_of, load = self._index.as_of(source), self._index.load(source)
        if as_of is None:
            return SourceState(known=False)
        return SourceState(
            known=as_of.known,
            suspect=not as_of.synced,
            age_ms=max(0, now_ns - as_of.heard_ns) / NS_PER_MS,
            told=Told.read(load.values, load.told_ns) if load is not None else None,
        )


class LocatorView:
    """Of an index elsewhere. What its sources and names are is asked for anew every ``REFRESH_NS``."""

    def __init__(self, locator: Locator, clock: Clock) -> None:
        self._locator = locator
        self._clock = clock
        self._refreshed_ns: int | None = None
        self._sources: list[Source] = []
        self._spaces: Names | None = None
        self._namespaces: Mapping[NamespaceId, Namespace] = {}
        self._ids: dict[int, NamespaceId] = {}

    def namespaces(self) -> Mapping[NamespaceId, Namespace]:
        self._refresh()
        return self._namespaces

    def sources_of(self, worker: Worker) -> Sequence[str]:
        told = self._spaces.workers.get(worker.name) if self._spaces is not None else None
        return told if told else worker.own_sources()

    def find(self, queries: Sequence[Query]) -> Found:
        self._refresh()
        rows = []
        for query in queries:
            wanted = query.namespaces if len(query.namespaces) <= NAMESPACES_MAX else frozenset()
            found = self._locator.match(query.hints, namespaces=wanted)
            if found is None:
                return Found(trouble=self._locator.trouble)
            self._learn(found.names)
            rows.append(self._located(found, query))
        if self._refreshed_ns is None:
            return Found(trouble=self._locator.trouble or "the index has not told its sources yet")
        since_ns = self._clock.now_ns() - self._refreshed_ns
        return Found(rows, {each.source: self._state(each, since_ns) for each in self._sources})

    def place(self, source: str, namespace: NamespaceId, hints: bytes) -> None:
        self._locator.place(source, namespace, hints)

    def troubles(self) -> list[str]:
        """For people. The index is asked if it was not lately, so that this is so without requests, too."""
        self._refresh()
        trouble = self._locator.trouble
        return (
            [f"choices are made without the index at {self._locator.address}: {trouble}"] if trouble else []
        )

    def _refresh(self) -> None:
        """Keeps what it has when the index does not answer: its age tells."""
        now_ns = self._clock.now_ns()
        if self._refreshed_ns is not None and now_ns - self._refreshed_ns < REFRESH_NS:
            return
        sources = self._locator.sources()
        names = self._locator.names() if sources is not None else None
        if sources is not None and names is not None:
            self._sources, self._refreshed_ns = sources, now_ns
            self._learn(names)

    def _learn(self, names: Names) -> None:
        if self._spaces is not None and names == self._spaces:
            return
        spaces, ids = {}, {}
        for space in names.namespaces:
            try:
                namespace = NamespaceId(bytes.fromhex(space.id))
                spaces[namespace] = Namespace.from_map(space.fields)
            except (KVCacheError, ValueError):
                continue  # Of another release: what cannot be named cannot be asked for.
            ids[space.number] = namespace
        self._spaces, self._namespaces, self._ids = names, spaces, ids

    def _located(self, found: Matches, query: Query) -> list[Located]:
        located = []
        columns = zip(found.sources, found.namespaces, found.blocks, found.placed, *found.tiers, strict=True)
        for source, space, blocks, placed, *tiers in columns:
            name, namespace = found.names.sources.get(source, ""), self._ids.get(space)
            if name and namespace in query.namespaces:
                assert namespace is not None and len(namespace) == HASH_BYTES
                located.append(Located(name, namespace, blocks, tuple(tiers), placed))
        return located

    def _state(self, source: Source, since_ns: int) -> SourceState:
        told = None
        if source.load_age_ms >= 0:
            assert self._refreshed_ns is not None
            told = Told.read(source.load, self._refreshed_ns - source.load_age_ms * NS_PER_MS)
        return SourceState(
            known=source.state != "unknown",
            suspect=source.state == "suspect",
            age_ms=source.age_ms + since_ns / NS_PER_MS,
            told=told,
        )
