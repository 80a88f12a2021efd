"""From a locate request to its answer: hashes, look-up, and what the shards of a source add up to.

Only namespaces of the caller's tenant are looked at: a hash that leaked tells nobody else where it lies.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import msgspec

from kvcache.block import HINT_BYTES, NamespaceId, chain, hints
from kvcache.clock import NS_PER_MS
from kvcache.engine_events.naming import ANY, salted
from kvcache.errors import BadInput
from kvcache.locality import TIERS, LocalityIndex, Located
from kvcache.locality import AsOf as SourceState
from kvcache.namespace import Namespace
from kvcache.packing import PREFIX_BLOCKS_MAX
from kvcache.sequence import PUBLIC, sequence_hashes
from kvcache.server import http_api as api

RANK_FIELDS = frozenset({"tp_rank", "pp_rank", "cp_rank", "layer_first", "layer_count", "shape"})
_NO_NAMESPACE = Namespace(model=ANY, weights=ANY, dtype=ANY, layout=ANY, block_tokens=1, shape=ANY)


def locate(
    index: LocalityIndex,
    tenant: str,
    tenant_key: bytes,
    request: api.LocateRequest,
    now_ns: int,
    is_of: Callable[[str, str], bool] = lambda source, tenant: True,
) -> api.LocateReply:
    """``is_of``: whether a source is one that a tenant may know of. RAISES BadInput when the request does not
    name a prefix."""
    visible = {
        each: namespace
        for each in index.known_namespaces()
        if (namespace := index.namespace(each)) is not None and namespace.tenant == tenant
    }
    if request.namespace is not None:
        visible = _one(visible, request.namespace)
    asked_blocks = 0
    found: dict[str, list[Located]] = {}
    for names, namespaces in _questions(request, visible, tenant_key):
        asked_blocks = max(asked_blocks, len(names) // HINT_BYTES)
        for each in index.locate(names, namespaces):
            found.setdefault(each.source, []).append(each)
    states = [each for each in index.sources() if is_of(each.source, tenant)]
    return api.LocateReply(
        complete=bool(states) and all(state.synced and not state.partial for state in states),
        asked_blocks=asked_blocks,
        sources=[_source(state, found.get(state.source, []), visible, now_ns) for state in states],
    )


def as_of(state: SourceState, now_ns: int) -> api.AsOf:
    return api.AsOf(
        incarnation=state.incarnation,
        seq=state.seq,
        age_ms=max(0, now_ns - state.heard_ns) // NS_PER_MS if state.heard_ns else 0,
    )


def _one(visible: dict[NamespaceId, Namespace], wanted: str) -> dict[NamespaceId, Namespace]:
    namespace_id = NamespaceId(bytes.fromhex(wanted))
    if namespace_id not in visible:
        raise BadInput(
            "unknown_namespace",
            f"no namespace {wanted} is known here",
            "no engine of this tenant has opened it, or the node restarted since",
            "name the model instead, or ask again once an engine uses it",
        )
    return {namespace_id: visible[namespace_id]}


def named(
    namespace: Namespace,
    tenant_key: bytes,
    tokens: Sequence[int] | None,
    hashes: Sequence[str] | None,
    cache_salt: str = "",
) -> bytes:
    """The hints of a prefix in this namespace, of its first ``PREFIX_BLOCKS_MAX`` blocks: no more are asked
    about at once. RAISES BadInput unless there are tokens, or hashes."""
    if (tokens is None) == (hashes is None):
        raise _unclear("a request with both tokens and hashes, or neither")
    if hashes is not None:
        return b"".join(bytes.fromhex(each)[:HINT_BYTES] for each in hashes)
    assert tokens is not None
    tokens = tokens[: PREFIX_BLOCKS_MAX * namespace.block_tokens]
    extra = salted(cache_salt)
    if namespace.layout == PUBLIC:
        return bytes(sequence_hashes(array("I", tokens), namespace.block_tokens, extra))
    root = namespace.root(tenant_key)
    return hints(chain(root, tenant_key, tokens, namespace.block_tokens, extra))


def _questions(
    request: api.LocateRequest, visible: dict[NamespaceId, Namespace], tenant_key: bytes
) -> list[tuple[bytes, dict[NamespaceId, Namespace]]]:
    """Hints, and in which namespaces they are names: nodes name blocks otherwise than engines are named."""
    tokens, hashes, model = request.tokens, request.hashes, request.model
    if hashes is not None or tokens is None:
        if model is not None:
            raise _unclear("a request with hashes and a model")
        return [(named(_NO_NAMESPACE, tenant_key, tokens, hashes), visible)]
    if (model is None) == (request.namespace is None):
        raise _unclear("a request with tokens and both a model and a namespace, or neither")
    if model is not None:
        fields = msgspec.to_builtins(model)
        keyed = Namespace(**fields, dtype=ANY, layout=ANY, shape=ANY)
    else:
        [keyed] = visible.values()
    split = _split(visible, keyed)
    schemes = [(keyed, split[False])] if keyed.layout != PUBLIC else []
    if keyed.layout == PUBLIC or split[True]:
        schemes.append((replace(keyed, layout=PUBLIC), split[True]))
    return [(named(names, tenant_key, tokens, None, request.cache_salt), spaces) for names, spaces in schemes]


def _split(
    visible: dict[NamespaceId, Namespace], meant: Namespace
) -> dict[bool, dict[NamespaceId, Namespace]]:
    """Those of nodes, and those of engines that are of this model."""
    found: dict[bool, dict[NamespaceId, Namespace]] = {False: {}, True: {}}
    for each, namespace in visible.items():
        is_public = namespace.layout == PUBLIC
        if not is_public or _is_same_model(namespace, meant):
            found[is_public][each] = namespace
    return found


def _is_same_model(engine: Namespace, meant: Namespace) -> bool:
    """Engines do not tell their weights; who runs them may have said."""
    same = (engine.model, engine.adapter, engine.block_tokens)
    return same == (meant.model, meant.adapter, meant.block_tokens) and (
        engine.weights == meant.weights or ANY in (engine.weights, meant.weights)
    )


def _unclear(what: str) -> BadInput:
    return BadInput(
        "bad_prefix",
        what,
        "a prefix is named in one way",
        "send hashes; or tokens with model; or tokens with namespace",
    )


def _source(
    state: SourceState, shards: Sequence[Located], visible: dict[NamespaceId, Namespace], now_ns: int
) -> api.Source:
    best = _usable(shards, visible) if state.known else None
    return api.Source(
        source=state.source,
        state="synced" if state.synced else "suspect" if state.known else "unknown",
        partial=state.partial,
        as_of=as_of(state, now_ns),
        blocks=best.blocks if best else None,
        tokens=best.tokens if best else None,
        tiers=best.tiers if best else None,
        shards=[_shard(each, visible[each.namespace]) for each in shards if each.blocks],
    )


def _usable(shards: Iterable[Located], visible: dict[NamespaceId, Namespace]) -> api.Shard:
    """An engine needs its block from every rank: of each shape the rank with least, of these the most.

    Only ranks that the source has, or has had, count: the others may be another host's."""
    shapes: dict[tuple[tuple[str, str | int], ...], Located] = {}
    for shard in shards:
        fields = visible[shard.namespace].to_map().items()
        shape = tuple((name, value) for name, value in fields if name not in RANK_FIELDS)
        least = shapes.setdefault(shape, shard)
        if shard.blocks < least.blocks:
            shapes[shape] = shard
    if not shapes:
        return api.Shard(namespace="", blocks=0, tokens=0, tiers=_tiers((0,) * len(TIERS)))
    best = max(shapes.values(), key=lambda shard: shard.blocks)
    return _shard(best, visible[best.namespace])


def _shard(found: Located, namespace: Namespace) -> api.Shard:
    return api.Shard(
        namespace=found.namespace.hex(),
        blocks=found.blocks,
        tokens=found.blocks * namespace.block_tokens,
        tiers=_tiers(found.tiers),
    )


def _tiers(counts: Sequence[int]) -> api.Tiers:
    return api.Tiers(**dict(zip(TIERS, counts, strict=True)))
