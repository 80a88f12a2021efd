"""What each worker can use of a prompt, from what its sources hold of it.

    engine's own events   hbm   ████████░░░░░░            leading run 8
    its node              host  ██████████░░░░     run 12: 10 host, the rest nvme
                          nvme  ████████████░░
    the worker                  ████████████░░     8 hbm, 2 host, 2 nvme

A source's run is, of each engine shape, that of the rank with least, and of these the longest: an engine
needs its block from every rank. A worker's is the longest run of its sources, in tokens, for they may have
blocks of different length; where several have a token, the fastest counts. Which tokens are in which tier is
not known, only how many, so the slower tiers are taken to be at the end: engines lose the ends of prefixes
first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kvcache.block import NamespaceId
from kvcache.fleet import Worker
from kvcache.locality import Located
from kvcache.namespace import Namespace
from kvcache.routing.names import Query, counts_for, shape_of

Shape = tuple[tuple[str, str | int], ...]
SHAPES_MAX = 65_536


@dataclass(frozen=True, slots=True)
class Usable:
    """In tokens. ``cached`` by the tier to load from, each token once; ``placed`` ones follow them."""

    cached: tuple[int, int, int] = (0, 0, 0)
    placed: int = 0


class Ranks:
    """Which ranks each source has of each shape: those that ever held a block. An answer without a row for
    one of them means that it holds nothing. Bounded; beyond the bound, what is new is not remembered."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, Shape], set[NamespaceId]] = {}
        self._shapes: dict[NamespaceId, Shape] = {}

    def shape(self, namespace_id: NamespaceId, namespace: Namespace) -> Shape:
        known = self._shapes.get(namespace_id)
        if known is None:
            known = shape_of(namespace)
            if len(self._shapes) < SHAPES_MAX:
                self._shapes[namespace_id] = known
        return known

    def saw(self, source: str, shape: Shape, namespace: NamespaceId) -> None:
        if len(self._seen) < SHAPES_MAX:
            self._seen.setdefault((source, shape), set()).add(namespace)

    def has(self, source: str, shape: Shape, namespace: NamespaceId) -> bool:
        return namespace in self._seen.get((source, shape), ())

    def all_there(self, source: str, shape: Shape, rows: int) -> bool:
        return rows >= len(self._seen.get((source, shape), ()))


def usable(
    worker: Worker,
    sources: Sequence[str],
    queries: Sequence[Query],
    rows: Sequence[Mapping[str, Sequence[Located]]],
    namespaces: Mapping[NamespaceId, Namespace],
    ranks: Ranks,
) -> Usable:
    """Of one worker. ``rows``: of each query the answers, by source."""
    best = Usable()
    for query, by_source in zip(queries, rows, strict=True):
        for source in sources:
            held = by_source.get(source)
            if held:
                best = _union(best, _of_source(worker, source, held, query.block_tokens, namespaces, ranks))
    return best


def _of_source(
    worker: Worker,
    source: str,
    held: Sequence[Located],
    block_tokens: int,
    namespaces: Mapping[NamespaceId, Namespace],
    ranks: Ranks,
) -> Usable:
    shapes: dict[Shape, list[Located]] = {}
    for each in held:
        namespace = namespaces.get(each.namespace)
        if namespace is not None and counts_for(worker, namespace):
            shape = ranks.shape(each.namespace, namespace)
            ranks.saw(source, shape, each.namespace)
            shapes.setdefault(shape, []).append(each)
    best = Usable()
    for shape, shards in shapes.items():
        if ranks.all_there(source, shape, len(shards)):
            best = _union(best, _tokens(shards, block_tokens))
    return best


def _tokens(shards: Sequence[Located], block_tokens: int) -> Usable:
    """What all ranks have, by tier, each block once; then what is predicted for all of them."""
    least = min(shards, key=lambda each: each.blocks)
    blocks = least.blocks
    hbm = min(least.tiers[0], blocks)
    host = min(least.tiers[1], blocks - hbm)
    placed = min(each.blocks + each.placed for each in shards) - blocks
    tiers = hbm * block_tokens, host * block_tokens, (blocks - hbm - host) * block_tokens
    return Usable(tiers, placed * block_tokens)


def _union(a: Usable, b: Usable) -> Usable:
    """Both have the first tokens; the longer run counts, and of it as much in a fast tier as either has."""
    told = max(sum(a.cached), sum(b.cached))
    hbm = max(a.cached[0], b.cached[0])
    fast = max(a.cached[0] + a.cached[1], b.cached[0] + b.cached[1], hbm)
    end = max(sum(a.cached) + a.placed, sum(b.cached) + b.placed)
    return Usable((hbm, fast - hbm, told - fast), max(0, end - told))
