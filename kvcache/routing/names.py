"""What a prompt's blocks are called, scheme by scheme, and whose blocks count for a worker.

    tokens ──keyed chain of a root──► hints       nodes: a root is tenant, model, weights, epoch, adapter, ...
           ──sequence hashes────────► hints       engines' own events: block length only

One query a scheme that some worker's namespaces need; each asks for the namespaces of that scheme alone, so
that names of one are never compared with those of another. A namespace counts for a worker when tenant
and adapter agree, and the weights, or else the model: what a node holds for another model must
not be credited, whatever its tokens.

The sum: 0.9 us a block for the keyed chain, 8 ns for sequence hashes (C++).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from kvcache.block import TOKEN_BYTES, BlockHash, NamespaceId, chain, hints
from kvcache.fleet import Worker
from kvcache.namespace import Namespace
from kvcache.packing import PREFIX_BLOCKS_MAX
from kvcache.sequence import PUBLIC, sequence_hashes

SCHEMES_MAX = 16
RANK_FIELDS = frozenset({"tp_rank", "pp_rank", "cp_rank", "layer_first", "layer_count", "shape"})

TenantKey = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Query:
    """One question to the index: these names, in these namespaces only."""

    hints: bytes
    block_tokens: int
    namespaces: frozenset[NamespaceId]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How blocks of some namespaces are named: ``root`` empty for public sequence hashes."""

    tenant: str
    root: bytes
    block_tokens: int


def scheme_of(namespace: Namespace, tenant_key: TenantKey) -> Scheme:
    """How this namespace's blocks are named. RAISES BadInput for a key that is none."""
    if namespace.layout == PUBLIC:
        return Scheme("", b"", namespace.block_tokens)
    root = namespace.root(tenant_key(namespace.tenant))
    return Scheme(namespace.tenant, root, namespace.block_tokens)


def queries(
    tokens: bytes, schemes: Mapping[Scheme, frozenset[NamespaceId]], tenant_key: TenantKey
) -> tuple[Query, ...]:
    """The questions for a prompt, ``tokens`` being packed (``block.pack_tokens``)."""
    return tuple(
        Query(_names(tokens, scheme, tenant_key), scheme.block_tokens, namespaces)
        for scheme, namespaces in list(schemes.items())[:SCHEMES_MAX]
    )


def counts_for(worker: Worker, namespace: Namespace) -> bool:
    """Whether blocks of one of its sources in this namespace are any that the worker can use."""
    if namespace.tenant != worker.tenant or namespace.adapter != worker.adapter:
        return False
    return namespace.layout == PUBLIC or is_model_of(
        worker, namespace
    )  # What an engine has is its own model's.


def is_model_of(worker: Worker, namespace: Namespace) -> bool:
    if worker.weights and namespace.layout != PUBLIC:
        return namespace.weights == worker.weights
    return not worker.model or _last(namespace.model) == _last(worker.model)


def shape_of(namespace: Namespace) -> tuple[tuple[str, str | int], ...]:
    """What the ranks of one engine have in common: a block is usable when each of them has it."""
    return tuple((name, value) for name, value in namespace.to_map().items() if name not in RANK_FIELDS)


def _names(tokens: bytes, scheme: Scheme, tenant_key: TenantKey) -> bytes:
    """Of as many blocks as one question may name."""
    tokens = tokens[: PREFIX_BLOCKS_MAX * scheme.block_tokens * TOKEN_BYTES]
    if not scheme.root:
        return bytes(sequence_hashes(tokens, scheme.block_tokens))
    return hints(chain(BlockHash(scheme.root), tenant_key(scheme.tenant), tokens, scheme.block_tokens))


def _last(model: str) -> str:
    """``org/model`` and ``/path/model`` are both called ``model``."""
    return model.rstrip("/").rpartition("/")[2].lower()
